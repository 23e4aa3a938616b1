import jax
import numpy as np
import pytest

from mnist_flax import random_bits, share_keys
from tests.helpers import quick_jit

# Traced anew in every test, which patches what it calls.
at_least = random_bits.at_least.__wrapped__


def chooses(platform):
    return lambda *args, **branches: branches[platform](*args)


def expected(key, threshold, shape):
    words = np.asarray(jax.random.bits(key, (-(-shape[0] // 2), *shape[1:])))
    pairs = np.stack([words & 0xFFFF, words >> 16], axis=1)
    return (pairs.reshape(-1, *shape[1:]) >= threshold)[: shape[0]]


@pytest.mark.parametrize("shape", [(0, 3), (1,), (1000, 7), (5, 3, 4), (3, 2**14 + 1)])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_numbers_are_the_halves_of_jax_randoms_words(monkeypatch, platform, impl, shape):
    monkeypatch.setattr(random_bits.lax, "platform_dependent", chooses(platform))
    key = jax.random.fold_in(jax.random.key(7, impl=impl), 2**31 + 5)
    ours = quick_jit(at_least, static_argnums=(1, 2))(key, 2**14, shape)
    np.testing.assert_array_equal(ours, expected(key, 2**14, shape))


@pytest.mark.parametrize("shape", [(3, 2**14 + 1), (4, 2**14 + 1)])
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_a_share_is_a_part_of_the_whole(monkeypatch, platform, shape):
    monkeypatch.setattr(random_bits.lax, "platform_dependent", chooses(platform))
    key = jax.random.key(7, impl="threefry2x32")
    ours = at_least(share_keys.of_share(key, 1), 2**14, shape)
    whole = expected(key, 2**14, (2 * shape[0], *shape[1:]))
    np.testing.assert_array_equal(ours, whole[shape[0] :])


def test_keys_of_the_old_kind():
    key = jax.random.PRNGKey(3)
    ours = at_least(key, 2**15, (10,))
    np.testing.assert_array_equal(ours, expected(key, 2**15, (10,)))


def test_words_have_32_bits_where_64_are_the_default():
    # Of another generator, whose bits JAX makes.
    with jax.enable_x64(True):
        kept = at_least(jax.random.key(0, impl="rbg"), 2**14, (100, 400))
    for half in (kept[::2], kept[1::2]):
        # Within five deviations of 20,000 draws.
        assert abs(half.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / half.size)
