"""One 5×5 convolution and one hidden dense layer; 10 epochs.

    python -m mnist_flax.main --config=configs/baseline.py

The tutorial reports 99.07 % on the test set.
"""

from mnist_flax.config import recipe


def get_config(dataset="mnist"):
    return recipe(
        "baseline",
        dataset,
        model="baseline",
        optimizer="adam",
        batch_size=200,
        epochs=10,
        seed=7,
    )
