"""Keys by which the devices that share a batch draw the random numbers that one would draw.

Threefry makes each number from the key and the number's place alone, so that a device can make its
part of them by itself. `jax.random` does so where arrays are sharded over a mesh; inside `pmap` and
`shard_map`, where each device has an array of its own, a key has to say which part is meant.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import random as extend

THREEFRY = "threefry2x32"


def of_share(key: jax.Array, share: jax.Array | int) -> jax.Array:
    """The key with which one of several devices draws its share of a batch's random numbers.

    Where each draws an array whose first axis is its own examples, these arrays one after the other
    are what `key` gives for the whole batch: of three devices that draw [4, 5], share 1 gets rows 4
    to 7 of `key`'s [12, 5]. What is drawn without that axis differs from device to device. Keys
    that are split or folded from this one are of the same share.

    Args:
        key: of `jax.random.key(seed, impl="threefry2x32")`.
        share: int32 scalar, the device's place among them, from 0.

    Returns:
        A key for `jax.random` and Flax's layers. Together the devices may draw 2**32 numbers of it,
        which begin anew after that.

    Raises:
        ValueError: the key is of another generator.
    """
    if (impl := jax.random.key_impl(key)) != THREEFRY:
        raise ValueError(f"a key of {THREEFRY} can be shared, and this is one of {impl}")
    data = jax.random.key_data(key)
    share = lax.convert_element_type(share, data.dtype).reshape(1)
    return jax.random.wrap_key_data(jnp.concatenate([data, share]), impl=_OF_SHARE)


def threefry(key: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    """The Threefry key's data, uint32 [2], and its share, uint32; None of another generator."""
    impl = jax.random.key_impl(key)
    if impl not in (THREEFRY, _OF_SHARE):
        return None
    data = jax.random.key_data(key)
    return data[:2], data[2] if impl == _OF_SHARE else jnp.uint32(0)


def _own(key):
    """The key of all devices, of a share's."""
    return jax.random.wrap_key_data(key[:2], impl=THREEFRY)


def _with_share(key, changed):
    """A share's keys of changed ones of all devices."""
    data = jax.random.key_data(changed)
    return jnp.concatenate([data, jnp.broadcast_to(key[2:], (*data.shape[:-1], 1))], axis=-1)


def _split(key, shape):
    return _with_share(key, jax.random.split(_own(key), shape))


def _fold_in(key, data):
    return _with_share(key, jax.random.fold_in(_own(key), data))


def _random_bits(key, width, shape):
    """`jax.random.bits` from the counter on at which the share begins."""
    size = math.prod(shape)
    low = key[2] * jnp.uint32(size) + lax.iota(jnp.uint32, size)
    first, second = extend.threefry2x32_p.bind(key[0], key[1], jnp.zeros_like(low), low)
    dtype = jnp.dtype(f"uint{width}")
    bits = (first ^ second).astype(dtype)
    if width == 64:
        bits = first.astype(dtype) << dtype.type(32) | second.astype(dtype)
    return bits.reshape(shape)


def _seed(seed):
    data = jax.random.key_data(jax.random.key(seed, impl=THREEFRY))
    return jnp.append(data, jnp.uint32(0))


_OF_SHARE = extend.define_prng_impl(
    key_shape=(3,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32_of_share",
    tag="fry_share",
)
