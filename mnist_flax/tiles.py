"""What convolutions on CPU are made of: tiles of images, blocks of batches, products."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

# Batches of fewer images are not split: where one is not shared its device has all cores, for which
# the products of a block would be too small.
_MIN_SPLIT = 16


def fit(x: jax.Array, h: int, w: int) -> jax.Array:
    """[B, H, W, C] cut or filled up with zeros to [B, h, w, C]."""
    x = jnp.pad(x, ((0, 0), (0, max(0, h - x.shape[1])), (0, max(0, w - x.shape[2])), (0, 0)))
    return x[:, :h, :w]


def is_split(batch: int) -> bool:
    """Whether a batch is split at all."""
    return batch >= _MIN_SPLIT


def splitter(batch: int, most: int) -> Callable[[jax.Array], jax.Array]:
    """A function from [B, ...] to [blocks, block, ...] with blocks of at most `most` images.

    Of a batch that is not split at all there is one block.
    A batch that no good block size divides is cut into as few blocks of one size as there can be,
    the last filled up with zeros, which add nothing to sums.
    """
    most = max(1, min(batch, most) if is_split(batch) else batch)
    divisor = max(n for n in range(1, most + 1) if batch % n == 0)
    size = divisor if 2 * divisor >= most else -(-batch // -(-batch // most))
    blocks = -(-batch // size)

    def split(a):
        filled = jnp.pad(a, ((0, blocks * size - batch), *((0, 0) for _ in a.shape[1:])))
        return filled.reshape(blocks, size, *a.shape[1:])

    return split


def join(blocks: jax.Array, batch: int) -> jax.Array:
    """Blocks [blocks, block, ...] as the batch [B, ...] that they were split from."""
    return blocks.reshape(-1, *blocks.shape[2:])[:batch]


def zero(x: jax.Array) -> jax.Array:
    """Zeros to which products of x's dtype are added."""
    # Not `zeros`: under `shard_map` a sum must vary from device to device from its start on.
    return 0 * x.astype(sum_dtype(x))


def concatenate(parts: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """Parts of one shape along an axis, written in place.

    XLA on CPU would fuse what makes the parts, and branch for each number.
    """
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    whole = jnp.zeros(shape, parts[0].dtype)
    for i, part in enumerate(parts):
        whole = lax.dynamic_update_slice_in_dim(whole, part, i * part.shape[axis], axis)
    return whole


def sum_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype in which products of x's dtype are summed."""
    return jnp.promote_types(x.dtype, jnp.float32)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.dot` with sums, and so the result, in float32 at least."""
    return jnp.dot(a, b, preferred_element_type=sum_dtype(a))
