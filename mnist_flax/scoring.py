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

_PIECE_EXAMPLES = 10_000
_BATCH_PIXELS = 500 * 28 * 28


def batch_size(image_shape: tuple[int, int, int]) -> int:
    """How many images are scored at once: 500 of MNIST's, fewer of a larger size."""
    return max(1, min(500, _BATCH_PIXELS // math.prod(image_shape[:2])))


def compile_scorer(
    model: nn.Module, variables: Any, loader: Loader, mesh: Mesh, seeds: int = 1
) -> Callable[[Any], dict[str, Any]]:
    """A compiled function from variables to {"loss", "accuracy", "count"} on its data.

    Every example counts once, whatever their number. `variables` may be abstract. With several
    seeds they have a leading axis, and loss and accuracy are lists.
    """
    size = batch_size(loader.image_shape)
    rows = batches.eval_batches(loader.size, size)
    length = max(1, min(len(rows), loader.max_examples // (seeds * size), _PIECE_EXAMPLES // size))
    epoch = partial(steps.eval_epoch, model=model)
    epoch = epochs.compile_epoch(
        epoch, mesh, variables, loader, size, steps=len(rows), length=length, seeds=seeds
    )
    rows = np.repeat(rows[:, None], seeds, axis=1)

    def program(variables: Any, piece: Piece) -> tuple[Any, steps.Metrics]:
        return variables, epoch(variables, piece)

    def score(variables: Any) -> dict[str, Any]:
        pieces = epochs.run_pieces(program, variables, loader.pieces(rows, length))
        parts = [metrics for _, metrics in pieces]
        sums = jax.tree.map(lambda *sums: np.sum(sums, axis=0, dtype=float), *parts)
        return steps.averages(sums)

    return score
