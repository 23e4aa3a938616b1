"""Exact scores of a data set."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from mnist_flax import batches, epochs, steps
from mnist_flax.loaders import Loader, Piece

_PIECE = 10_000
_PIXELS = 500 * 28 * 28


def batch_size(image_shape: tuple[int, int, int]) -> int:
    """How many images are scored at once: 500 of MNIST's, fewer of a larger size."""
    return max(1, min(500, _PIXELS // math.prod(image_shape[:2])))


def compile_scorer(
    model: nn.Module, variables: Any, data: Loader, mesh: Mesh, seeds: int = 1
) -> Callable[[Any], dict[str, Any]]:
    """A compiled function from variables to {"loss", "accuracy", "count"} on `data`.

    Every example counts once, whatever their number. `variables` may be abstract. With several
    seeds they have a leading axis, and loss and accuracy are lists.
    """
    size = batch_size(data.image_shape)
    rows = batches.eval_batches(data.size, size)
    length = max(1, min(len(rows), data.max_examples // (seeds * size), _PIECE // size))
    epoch = partial(steps.eval_epoch, model=model)
    epoch = epochs.compile_epoch(
        epoch, mesh, variables, data, size, steps=len(rows), length=length, seeds=seeds
    )
    rows = np.repeat(rows[:, None], seeds, axis=1)

    def program(variables: Any, piece: Piece) -> tuple[Any, steps.Metrics]:
        return variables, epoch(variables, piece)

    def score(variables: Any) -> dict[str, Any]:
        pieces = epochs.run_pieces(program, variables, data.pieces(rows, length))
        parts = [metrics for _, metrics in pieces]
        sums = jax.tree.map(lambda *sums: np.sum(sums, axis=0, dtype=float), *parts)
        return steps.averages(sums.loss_sum, sums.correct, sums.count)

    return score
