"""Exact scores of a data set."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from mnist_flax import batches, parallel, steps
from mnist_flax.loaders import Loader

_BATCH_SIZE = 500
_PIECE = 10_000


def compile_scorer(
    model: nn.Module, variables: Any, data: Loader, mesh: Mesh
) -> Callable[[Any], dict[str, Any]]:
    """A compiled function from variables to {"loss", "accuracy", "count"} on `data`.

    Every example counts once, whatever their number. `variables` may be abstract.
    """
    rows = batches.eval_batches(data.size, _BATCH_SIZE)
    length = max(1, min(len(rows), data.most // _BATCH_SIZE, _PIECE // _BATCH_SIZE))
    epoch = partial(steps.eval_epoch, model=model)
    epoch = parallel.compile_epoch(
        epoch, mesh, variables, data, _BATCH_SIZE, steps=len(rows), length=length
    )

    def score(variables: Any) -> dict[str, Any]:
        parts = [jax.device_get(epoch(variables, piece)) for piece in data.pieces(rows, length)]
        return averages(jax.tree.map(lambda *sums: sum(s.item() for s in sums), *parts))

    return score


def averages(metrics: steps.Metrics) -> dict[str, Any]:
    """Means over examples as Python numbers, from sums on the host."""
    count = int(metrics.count)
    return {
        "loss": float(metrics.loss_sum) / count,
        "accuracy": int(metrics.correct) / count,
        "count": count,
    }
