"""Random bits by JAX's own generator, made faster on CPU.

JAX compiles its generator there to a loop whose five rounds each go through memory. Written out
it is one fusion, in a fifth of the time. XLA also fuses it into whatever reads the bits, forwards
and backwards, and so makes each word several times; a loop keeps it from that.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

# Words of a block, which stay in a core's cache.
_BLOCK = 2**14


def at_least(key: jax.Array, threshold: int, count: int) -> jax.Array:
    """Whether each of `count` numbers of 16 random bits is `threshold` or more: bool [count].

    They are the lower halves of the words `jax.random.bits(key, (ceil(count / 2),))`, as JAX makes
    them by default (`jax_threefry_partitionable`), then the upper halves. `threshold` is below
    2**16, `count` below 2**32.
    """
    words = -(-count // 2)
    if jax.random.key_impl(key) != "threefry2x32":
        pairs = _compared(jax.random.bits(key, (words,)), threshold)
    else:
        pairs = lax.platform_dependent(
            jax.random.key_data(key),
            cpu=partial(_in_blocks, threshold=threshold, words=words),
            default=partial(_made, threshold=threshold, words=words),
        )
    halves = pairs >> jnp.uint8([[0], [1]]) & 1
    return (halves == 1).reshape(-1)[:count]


def _in_blocks(key, threshold, words):
    """`_made`, but in a loop of blocks, from which XLA cannot take it."""
    blocks = max(1, -(-words // _BLOCK))
    size = -(-words // blocks)
    starts = size * jnp.arange(blocks, dtype=jnp.uint32)
    return lax.map(partial(_made, key, threshold, size), starts).reshape(-1)[:words]


def _made(key, threshold, words, start=0):
    first, second = _threefry(key, start + lax.iota(jnp.uint32, words))
    return _compared(first ^ second, threshold)


def _compared(words, threshold):
    """Both halves of each word in a byte: the lower one's comparison in bit 0, the upper's in 1."""
    lower, upper = ((half >= threshold).astype(jnp.uint8) for half in (words & 0xFFFF, words >> 16))
    return lower | upper << 1


def _threefry(key, low):
    """Threefry-2x32 of 20 rounds (Salmon et al., 2011) of the counters (0, low)."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = jnp.full_like(low, keys[0]), low + keys[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = x ^ (y << rotation | y >> (32 - rotation))
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y
