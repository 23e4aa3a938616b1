"""Exact scores of a data set that lies on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from mnist_flax import batches, steps
from mnist_flax.datasets import Arrays

_BATCH_SIZE = 500


def compile_scorer(
    model: nn.Module, variables: Any, arrays: Arrays
) -> Callable[[Any], dict[str, Any]]:
    """A compiled function from variables to {"loss", "accuracy", "count"} on `arrays`.

    Every example counts once, whatever their number. `variables` may be abstract.
    """
    arrays = jax.device_put(arrays)
    rows = jax.device_put(batches.eval_batches(len(arrays.labels), _BATCH_SIZE))
    epoch = (
        jax.jit(partial(steps.eval_epoch, model=model)).lower(variables, *arrays, rows).compile()
    )
    return lambda variables: averages(jax.device_get(epoch(variables, *arrays, rows)))


def averages(metrics: steps.Metrics) -> dict[str, Any]:
    """Means over examples as Python numbers, from sums on the host."""
    count = int(metrics.count)
    return {
        "loss": float(metrics.loss_sum) / count,
        "accuracy": int(metrics.correct) / count,
        "count": count,
    }
