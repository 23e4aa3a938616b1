"""Which example goes into which batch: pure functions, so that a run can resume anywhere."""

import numpy as np


def train_batches(seed: int, epoch: int, num_examples: int, batch_size: int) -> np.ndarray:
    """A fresh shuffle of the examples for each (seed, epoch).

    Returns:
        int32 [steps, batch_size]: row `step` holds the indices of that step's examples. The
        last, short batch is filled up with -1, which `steps.gather` masks.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return _rows(order, batch_size)


def eval_batches(num_examples: int, batch_size: int) -> np.ndarray:
    """Every example once, in order; int32 [steps, batch_size], filled up with -1."""
    return _rows(np.arange(num_examples), batch_size)


def _rows(indices: np.ndarray, batch_size: int) -> np.ndarray:
    filling = -len(indices) % batch_size
    rows = np.pad(indices.astype(np.int32), (0, filling), constant_values=-1)
    return rows.reshape(-1, batch_size)
