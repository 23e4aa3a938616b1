"""Two convolutions and two hidden dense layers; 10 epochs.

    python -m mnist_flax.main --config=configs/larger.py

The tutorial reports 99.03 % on the test set.
"""

from mnist_flax.config import recipe


def get_config(dataset="mnist"):
    return recipe(
        "larger",
        dataset,
        model="larger",
        optimizer="adam",
        batch_size=200,
        epochs=10,
        seed=7,
    )
