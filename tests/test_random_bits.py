import jax
import numpy as np
import pytest

from mnist_flax import random_bits


def expected(key, threshold, count):
    words = np.asarray(jax.random.bits(key, (-(-count // 2),)))
    return (np.concatenate([words & 0xFFFF, words >> 16]) >= threshold)[:count]


@pytest.mark.parametrize("count", [0, 1, 1000, 2**16 + 1])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_numbers_are_the_halves_of_jax_randoms_words(monkeypatch, platform, impl, count):
    def choose(*args, **branches):
        return branches[platform](*args)

    monkeypatch.setattr(random_bits.lax, "platform_dependent", choose)
    key = jax.random.fold_in(jax.random.key(7, impl=impl), 2**31 + 5)
    ours = jax.jit(random_bits.at_least, static_argnums=(1, 2))(key, 2**14, count)
    np.testing.assert_array_equal(ours, expected(key, 2**14, count))


def test_keys_of_the_old_kind():
    key = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(random_bits.at_least(key, 9, 10), expected(key, 9, 10))
