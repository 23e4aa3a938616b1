"""Three convolutions and RMSprop; 8 epochs, nothing watched.

    python -m mnist_flax.main --config=configs/convnet.py

The tutorial reports 99.22 % on the test set.
"""

from mnist_flax.config import recipe


def get_config(dataset="mnist"):
    return recipe(
        "convnet",
        dataset,
        model="convnet",
        optimizer="rmsprop",
        batch_size=64,
        epochs=8,
        data__watch_split="",
    )
