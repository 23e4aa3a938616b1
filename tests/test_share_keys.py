import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax import layers, share_keys
from tests.helpers import quick_jit


def folded_and_split(key, shape):
    return jax.random.bits(jax.random.split(jax.random.fold_in(key, 2**31 + 5), 3)[1], shape)


def dropped(layer, **options):
    def draw(key, shape):
        return layer.apply({}, jnp.ones(shape), rngs={"dropout": key}, **options)

    return draw


DRAWS = {
    "8 bits": lambda key, shape: jax.random.bits(key, shape, "uint8"),
    "32 bits": jax.random.bits,
    "uniform": jax.random.uniform,
    "folded and split": folded_and_split,
    "Flax's dropout": dropped(nn.Dropout(0.5), deterministic=False),
    "our dropout": dropped(layers.Dropout(0.5), train=True),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("shape", [(4, 7), (5, 2, 3)])
def test_shares_are_parts_of_what_one_device_draws(draw, shape):
    key = jax.random.key(7, impl="threefry2x32")

    def share(index):
        return draw(share_keys.of_share(key, index), shape)

    one = quick_jit(share)
    together = np.concatenate([one(index) for index in range(3)])
    alone = quick_jit(lambda: draw(key, (3 * shape[0], *shape[1:])))()
    assert len(np.unique(alone)) > 1
    np.testing.assert_array_equal(together, alone)
    at_once = quick_jit(jax.vmap(share))(jnp.arange(3)).reshape(alone.shape)
    np.testing.assert_array_equal(at_once, alone)


def test_64_bits_of_shares():
    with jax.enable_x64(True):
        key = jax.random.key(7, impl="threefry2x32")
        shares = [jax.random.bits(share_keys.of_share(key, i), (4,), "uint64") for i in range(2)]
        alone = jax.random.bits(key, (8,), "uint64")
        np.testing.assert_array_equal(np.concatenate(shares), alone)


def test_a_share_of_another_generators_key_is_refused():
    with pytest.raises(ValueError, match="threefry2x32"):
        share_keys.of_share(jax.random.key(7, impl="rbg"), 0)
