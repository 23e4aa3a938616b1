"""Random bits of JAX's own generator, faster on CPU.

JAX compiles its generator there to a loop whose five rounds each go through memory. Written out
it is one fusion, in a fifth of the time. XLA also fuses it into whatever reads the bits, forwards
and backwards, and so makes each word several times; a loop keeps it from that.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mnist_flax import share_keys

# Words of a block, which stay in a core's cache.
_BLOCK_WORDS = 2**14


# Jitted, as outside of any `jit` it would be compiled anew in every call; inside of one,
# `inline=True` leaves no call of its own.
@partial(jax.jit, static_argnames=("threshold", "shape"), inline=True)
def at_least(key: jax.Array, threshold: int, shape: tuple[int, ...]) -> jax.Array:
    """Draws 16 random bits for each element and says whether they are `threshold` or more.

    Examples 2i and 2i + 1 share row i of `jax.random.bits(key, (ceil(B / 2), ...))`, as JAX makes
    it by default (`jax_threefry_partitionable`): the even one takes the lower half of each word,
    the odd one the upper. With a key of `share_keys.of_share`, i counts in the whole batch.

    Args:
        key: one key, of any generator.
        threshold: below 2**16.
        shape: [B, ...]. The words of the whole batch are fewer than 2**32.

    Returns:
        bool of `shape`.
    """
    examples, elements = (math.prod(part) for part in (shape[:1], shape[1:]))
    # Of an odd number, a share may begin with the second example of a row or end with the first.
    rows = -(-examples // 2)
    words = rows * elements
    if (known := share_keys.threefry(key)) is None:
        first = jnp.uint32(0)
        pairs = _compared(jax.random.bits(key, (words,), jnp.uint32), threshold)
    else:
        data, share = known
        first = share * jnp.uint32(examples)
        pairs = lax.platform_dependent(
            data,
            first // 2 * jnp.uint32(elements),
            cpu=partial(_in_blocks, threshold=threshold, words=words),
            default=partial(_made, threshold=threshold, words=words),
        )
    halves = pairs.reshape(rows, 1, elements) >> jnp.uint8([[0], [1]]) & 1
    each = (halves == 1).reshape(2 * rows, elements)
    if examples % 2:
        each = lax.dynamic_slice_in_dim(each, first % 2, examples)
    return each.reshape(shape)


def _in_blocks(key, start, threshold, words):
    """`_made`, but in a loop of blocks, from which XLA cannot take it."""
    blocks = max(1, -(-words // _BLOCK_WORDS))
    size = -(-words // blocks)
    starts = start + size * jnp.arange(blocks, dtype=jnp.uint32)
    made = partial(_made, key, threshold=threshold, words=size)
    return lax.map(made, starts).reshape(-1)[:words]


def _made(key, start, threshold, words):
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
