import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax import random_bits
from mnist_flax.layers import Dropout


@pytest.mark.parametrize("count", [0, 1, 1000])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_bits_are_those_of_jax_random(impl, count):
    key = jax.random.fold_in(jax.random.key(7, impl=impl), 2**31 + 5)
    ours = jax.jit(random_bits.bits, static_argnums=1)(key, count)
    np.testing.assert_array_equal(ours, jax.random.bits(key, (count,)))


def test_keys_of_the_old_kind():
    key = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(random_bits.bits(key, 10), jax.random.bits(key, (10,)))


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_zeroes_its_share_and_scales_the_rest(rate):
    x = jnp.ones((99, 1001))
    y = Dropout(rate).apply({}, x, True, rngs={"dropout": jax.random.key(1)})
    # Five standard deviations of the share of as many independent draws.
    assert abs((y == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-4)
    np.testing.assert_array_equal(Dropout(rate).apply({}, x, False), x)
