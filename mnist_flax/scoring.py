"""Exact scores of a data set."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from mnist_flax import batches, epochs, parallel, steps
from mnist_flax.loaders import Loader

_BATCH_SIZE = 500
_PIECE = 10_000


def compile_scorer(
    model: nn.Module, variables: Any, data: Loader, mesh: Mesh, seeds: int = 1
) -> Callable[[Any], dict[str, Any]]:
    """A compiled function from variables to {"loss", "accuracy", "count"} on `data`.

    Every example counts once, whatever their number. `variables` may be abstract. With several
    seeds they have a leading axis, and loss and accuracy are lists.
    """
    rows = batches.eval_batches(data.size, _BATCH_SIZE)
    most = data.most // (seeds * _BATCH_SIZE)
    length = max(1, min(len(rows), most, _PIECE // _BATCH_SIZE))
    epoch = partial(steps.eval_epoch, model=model)
    epoch = epochs.compile_epoch(
        epoch, mesh, variables, data, _BATCH_SIZE, steps=len(rows), length=length, seeds=seeds
    )
    rows = np.repeat(rows[:, None], seeds, axis=1)

    def score(variables: Any) -> dict[str, Any]:
        parts = [parallel.fetch(epoch(variables, piece)) for piece in data.pieces(rows, length)]
        sums = jax.tree.map(lambda *sums: np.sum(sums, axis=0, dtype=float), *parts)
        return averages(sums.loss_sum, sums.correct, sums.count)

    return score


def averages(loss_sum: ArrayLike, correct: ArrayLike, count: ArrayLike) -> dict[str, Any]:
    """Means over examples from sums on the host, numbers or [seeds], as numbers or lists."""
    counts = np.asarray(count, float)
    return {
        "loss": (np.asarray(loss_sum, float) / counts).tolist(),
        "accuracy": (np.asarray(correct, float) / counts).tolist(),
        "count": int(counts.flat[0]),
    }
