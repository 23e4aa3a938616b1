"""The networks of five Keras MNIST tutorials in Flax: models, a pure train step, resumable runs.

    import mnist_flax
    from mnist_flax import config

    mnist_flax.train_and_evaluate(config.default(), "runs/mine")
    mnist_flax.load("runs/mine").predict(images)

`mnist_flax.models` and `mnist_flax.steps` are for a training loop of your own.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "train_and_evaluate"]


def __getattr__(name: str) -> Any:
    # Training brings in Orbax and TFDS, which a user of the networks alone need not wait for.
    if name == "load":
        from mnist_flax.trained import load

        return load
    if name == "train_and_evaluate":
        from mnist_flax.train import train_and_evaluate

        return train_and_evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
