import re
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from mnist_flax import block_updates, models, optim, steps
from tests.helpers import integers, random_state

SHAPE = (9, 9, 1)


class TwoOfAShape(nn.Module):
    """Two kernels of one shape and one of another."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(models.Dense(81)(x.reshape(len(x), -1)))
        x = nn.relu(models.Dense(81)(x))
        return models.Dense(70)(x)


def epoch_of(tx):
    """An epoch of 20 steps, and its arguments."""
    start = random_state(TwoOfAShape(), tx, SHAPE)
    data = integers(0, (64, *SHAPE), 256, np.uint8), integers(1, 64, 10), integers(2, (20, 8), 64)
    return partial(steps.train_epoch, model=TwoOfAShape(), tx=tx), (start, *data)


def in_small_blocks(monkeypatch):
    """Kernels of 81 columns are cut into blocks of 30, 30 and 21 rows."""
    monkeypatch.setattr(block_updates, "_MIN_SIZE", 5000)
    monkeypatch.setattr(block_updates, "_BLOCK_SIZE", 2500)


@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_updates_in_blocks_are_those_of_whole_arrays_and_pieces_are_bitwise_the_same(
    optimizer, monkeypatch
):
    tx = optim.create(optimizer, optim.create_schedule("exponential", 1e-3, 20))
    epoch, arguments = epoch_of(tx)
    whole = jax.jit(epoch)(*arguments)
    in_small_blocks(monkeypatch)
    assert block_updates.large_shapes(tx, arguments[0].params) == {(81, 81), (81, 70)}
    epoch = jax.jit(epoch_of(tx)[0])
    blocks = epoch(*arguments)
    assert int(blocks[0].step) == 20
    # XLA's reciprocal square root, of which RMSprop makes use, depends on an array's length, and on
    # the processor: a mean square of 3e-10, of what nearly cancels, can differ by 1e-4 of itself.
    rtol, atol = (0, 0) if optimizer == "adam" else (1e-5, 1e-12)
    compare = partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(compare, blocks, whole)

    start, *data, rows = arguments
    for part in np.split(rows, 2):
        start, _ = epoch(start, *data, part)
    jax.tree.map(np.testing.assert_array_equal, blocks[0], start)


def test_a_step_in_blocks_copies_no_large_array(monkeypatch):
    in_small_blocks(monkeypatch)
    epoch, arguments = epoch_of(optim.create("adam", optax.constant_schedule(1e-3)))
    program = jax.jit(epoch, donate_argnums=0).lower(*arguments).compile().as_text()
    assert "f32[21,81]" in program
    assert not re.findall(r"f32\[81,(?:81|70)\]\S* copy\(.*", program)


def test_an_optimiser_that_mixes_numbers_is_not_cut():
    tx = optim.create("adam", optax.constant_schedule(1e-3))
    params = {"kernel": np.zeros((2048, 1024)), "bias": np.zeros(1024)}
    assert block_updates.large_shapes(tx, params) == {(2048, 1024)}
    clipped = optax.chain(optax.clip_by_global_norm(1.0), tx)
    assert block_updates.large_shapes(clipped, params) == set()
