"""2×2 max-pooling with stride 2."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mnist_flax import shardings
from mnist_flax.errors import UserError


def max_pool(x: jax.Array) -> jax.Array:
    """2×2 max-pooling with stride 2 of [B, H, W, C]; an odd last row or column is left out.

    Values and gradients are `flax.linen.max_pool(x, (2, 2), (2, 2))`'s: of equal numbers the
    first in row-major order gets the gradient. What is kept for the gradient is one byte an
    output, where XLA's own gradient keeps and scans the whole input again.

    Raises:
        UserError: the image is smaller than 2×2.
    """
    check(x.shape[1:3])
    return nn.max_pool(x, (2, 2), (2, 2)) if shardings.on_explicit_mesh(x) else _max_pool(x)


@jax.custom_vjp
def _max_pool(x):
    return _max_pool_fwd(x)[0]


def _max_pool_fwd(x):
    pooled, first = first_of_largest(*_corners(x))
    return pooled, (first, _size(x))


def _max_pool_bwd(residuals, g):
    first, size = residuals
    return (_to_first(first, size, g),)


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


@jax.custom_vjp
def bias_relu_pool(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`max_pool(nn.relu(x + bias))` of [B, H, W, C] and [C], for GPU and TPU.

    What is kept for the gradient is one byte an output, which says where it goes, if anywhere:
    XLA would keep the pooled numbers too, and write what ReLU leaves of the gradient. Of unequal
    numbers that adding the bias rounds to equal ones the largest gets it.
    """
    return _bias_relu_pool_fwd(x, bias)[0]


def _bias_relu_pool_fwd(x, bias):
    y, first = relu_pool(*_corners(x), bias)
    return y, (first, _size(x))


def _bias_relu_pool_bwd(residuals, g):
    first, size = residuals
    # XLA on GPU would merge padding with the convolution's gradient, for which cuDNN has no form.
    dx = lax.optimization_barrier(_to_first(first, size, g))
    return dx, jnp.where(first < 4, g, 0).sum((0, 1, 2))


bias_relu_pool.defvjp(_bias_relu_pool_fwd, _bias_relu_pool_bwd)


def _corners(x):
    h, w = x.shape[1:3]
    return [x[:, i : h // 2 * 2 : 2, j : w // 2 * 2 : 2] for i in (0, 1) for j in (0, 1)]


def _size(x):
    """An empty array that tells the gradient the height and width, which odd sizes would lose."""
    return jnp.empty((0, *x.shape[1:3]))


def _to_first(first, size, g):
    """The gradient of the pooled array: `g` at the first of the largest four, 0 elsewhere."""
    h, w = size.shape[1:]
    batch, oh, ow, channels = g.shape
    position = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    dx = jnp.where(first[:, :, None, :, None] == position, g[:, :, None, :, None], 0)
    dx = dx.reshape(batch, 2 * oh, 2 * ow, channels)
    return jnp.pad(dx, ((0, 0), (0, h - 2 * oh), (0, w - 2 * ow), (0, 0)))


def check(size: tuple[int, int]) -> None:
    """Raises UserError if an image of that height and width is smaller than a pool."""
    if min(size) < 2:
        raise UserError(
            f"images are too small for this network: {size[0]}×{size[1]} pixels reach a 2×2 "
            "max-pool; use larger images"
        )


def first_of_largest(
    a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The largest of four arrays and, as uint8, which of them has it first."""
    top, bottom = jnp.maximum(a, b), jnp.maximum(c, d)
    first = jnp.where(top >= bottom, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    return jnp.maximum(top, bottom), first.astype(jnp.uint8)


def relu_pool(
    a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """ReLU of the largest of four and bias; as uint8 which gets the gradient, 4 for none."""
    largest, first = first_of_largest(a, b, c, d)
    y = largest + bias
    return jax.nn.relu(y), jnp.where(y > 0, first, jnp.uint8(4))
