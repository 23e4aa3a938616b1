"""MNIST networks in Flax: model definitions, a pure train step and runs that can be trusted.

from mnist_flax import config, models      # the networks, for your own training
mnist_flax.train_and_evaluate(config.default(), workdir)
mnist_flax.load(workdir).predict(images)
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
