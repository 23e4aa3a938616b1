"""The networks of five Keras MNIST tutorials in Flax: models, a pure train step, resumable runs.

    import mnist_flax

    mnist_flax.train_and_evaluate(mnist_flax.config.default(), "runs/mine")
    mnist_flax.load("runs/mine").predict(images)

`mnist_flax.batches`, `models`, `optim`, `state` and `steps` are for a training loop of your own.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_MODULES = ("batches", "config", "models", "optim", "state", "steps")
__all__ = [*_MODULES, "load", "train_and_evaluate"]


def __getattr__(name: str) -> Any:
    # Training brings in Orbax and TFDS, which a user of the networks alone need not wait for.
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "load":
        from mnist_flax.trained import load

        return load
    if name == "train_and_evaluate":
        from mnist_flax.train import train_and_evaluate

        return train_and_evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
