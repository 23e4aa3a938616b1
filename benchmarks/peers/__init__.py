"""What a user might train these networks with, in the forms that its own users write.

Each module has `create(job, data, variant) -> Peer`. A worker process imports one of them, and so
one framework alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Job(NamedTuple):
    """What is trained; every peer gets the same.

    Attributes:
        network: name of the network.
        spec: the attributes of `mnist_flax.models.CNN` (convs, dense, conv_dropout,
            dense_dropout); None for `branched`, which is no stack.
        batch_size: examples a step.
        optimizer: "adam" or "rmsprop", with Keras's default numbers.
        device: "cpu" or "gpu".
        dtype: "float32", or "bfloat16" to compute in it with float32 parameters.
    """

    network: str
    spec: dict[str, Any] | None
    batch_size: int
    optimizer: str
    device: str
    dtype: str


class Data(NamedTuple):
    """images uint8 [N, 28, 28, 1], labels int32 [N], rows int32 [steps, B]: an epoch's order."""

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


@dataclass
class Peer:
    """A network ready to be trained.

    Attributes:
        parameters: number of trainable numbers.
        train: makes at least `steps` steps, on the batches of `Data.rows` in turn; returns the
            steps made and the seconds they took, the device having finished.
        loss: the mean loss over the `PROBE` images, without dropout.
        device_memory: bytes that were in use on a GPU at the peak; None where there is none.
    """

    parameters: int
    train: Callable[[int], tuple[int, float]]
    loss: Callable[[], float]
    device_memory: Callable[[], int | None]


def jax_memory() -> int | None:
    """Bytes in use on JAX's device at the peak; None on CPU, which does not count them."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


PROBE = slice(0, 500)
"""The training images on which every peer's loss is taken before and after."""
LEARNING_RATE, EPSILON, RHO = 1e-3, 1e-7, 0.9
"""Keras's defaults, which every peer uses, adding epsilon where its own optimiser adds it."""
