import jax
import numpy as np
import pytest

from mnist_flax import random_bits


@pytest.mark.parametrize("count", [0, 1, 1000])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_bits_are_those_of_jax_random(impl, count):
    key = jax.random.fold_in(jax.random.key(7, impl=impl), 2**31 + 5)
    ours = jax.jit(random_bits.bits, static_argnums=1)(key, count)
    np.testing.assert_array_equal(ours, jax.random.bits(key, (count,)))


def test_keys_of_the_old_kind():
    key = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(random_bits.bits(key, 10), jax.random.bits(key, (10,)))
