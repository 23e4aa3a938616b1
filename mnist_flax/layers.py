"""Convolution and max-pooling with Linen's parameters and results, fast where they run.

On GPU and TPU a convolution is XLA's own (cuDNN on GPU). XLA's convolution is slow on CPU, and
many times slower again inside a loop such as `lax.scan`, so there it is written as matrix
products over blocks of the batch that stay in cache. `lax.platform_dependent` chooses when the
program is lowered, so one traced function serves every platform.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from mnist_flax.errors import UserError

# Bytes of patches and outputs that one matrix product may touch. Measured on 4 MiB of L2 cache:
# splitting costs more than it saves below the first figure, and 4 to 8 MiB is best beyond it.
_UNSPLIT_BYTES = 64 * 2**20
_BLOCK_BYTES = 6 * 2**20


class Conv(nn.Module):
    """2-D convolution with stride 1, optionally max-pooled.

    Parameters are named and shaped as `flax.linen.Conv`'s: `kernel` [KH, KW, C, features] and
    `bias` [features]. They start as Keras's do: Glorot-uniform kernel, zero bias.

    With `pool`, the result is `max_pool(conv(x) + bias)`. The bias is added after the pool,
    which gives the same values, because adding a constant keeps the order of the numbers, and
    leaves a quarter of the work to the bias and its gradient.

    Attributes:
        features: number of output channels.
        kernel_size: (KH, KW).
        padding: "VALID" or "SAME".
        pool: whether to apply `max_pool` to the output.
        dtype: computation dtype; parameters are always float32.
    """

    features: int
    kernel_size: tuple[int, int]
    padding: str = "VALID"
    pool: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, OH, OW, features]; raises UserError if OH or OW is 0."""
        kernel_shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), kernel_shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = conv(x, kernel, self.padding)
        if self.pool:
            y = MaxPool()(y)
        return y + bias


class MaxPool(nn.Module):
    """`max_pool` as a module, so that summaries and interceptors see it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return max_pool(x)


class Concatenate(nn.Module):
    """Concatenation along the channels, as a module."""

    @nn.compact
    def __call__(self, inputs: list[jax.Array]) -> jax.Array:
        return jnp.concatenate(inputs, axis=-1)


class Flatten(nn.Module):
    """[B, H, W, C] to [B, H·W·C] in row-major order, as a module."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)


def conv_output_size(
    size: tuple[int, int], kernel_size: tuple[int, int], padding: str
) -> tuple[int, int]:
    """Height and width of a stride-1 convolution's output.

    Raises:
        UserError: the kernel does not fit into the image.
    """
    if padding == "SAME":
        return size
    out = tuple(n - k + 1 for n, k in zip(size, kernel_size, strict=True))
    if min(out) < 1:
        raise UserError(
            f"images are too small for this network: {size[0]}×{size[1]} pixels reach a "
            f"{kernel_size[0]}×{kernel_size[1]} convolution; use larger images."
        )
    return out


def conv(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
    """Stride-1 convolution (cross-correlation) of x [B, H, W, C] with kernel [KH, KW, C, F].

    The result has the operands' dtype; sums are kept in float32 at least.
    """
    conv_output_size(x.shape[1:3], kernel.shape[:2], padding)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_conv_as_matmul, padding=padding),
        default=partial(_conv_as_xla, padding=padding),
    )


def _conv_as_xla(x, kernel, *, padding):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _conv_as_matmul(x, kernel, *, padding):
    if padding == "SAME":
        x = jnp.pad(x, ((0, 0), *(((k - 1) // 2, k // 2) for k in kernel.shape[:2]), (0, 0)))
    return _valid_conv(x, kernel)


@jax.custom_vjp
def _valid_conv(x, kernel):
    """'Valid' convolution as matrix products over blocks of the batch.

    The gradients are written out: autodiff would turn the patches' gradient into KH·KW padded
    additions over the whole input, where a second convolution needs one pass.
    """
    forward, _, split = _plan(x, kernel)
    blocks = lax.map(lambda block: forward(block, kernel), split(x))
    return blocks.reshape(-1, *blocks.shape[2:])[: len(x)]


def _valid_conv_fwd(x, kernel):
    return _valid_conv(x, kernel), (x, kernel)


def _valid_conv_bwd(residuals, g):
    x, kernel = residuals
    kh, kw = kernel.shape[:2]
    full = jnp.pad(g, ((0, 0), (kh - 1, kh - 1), (kw - 1, kw - 1), (0, 0)))
    dx = _valid_conv(full, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))

    _, kernel_gradient, split = _plan(x, kernel)

    def add(total, block):
        return total + kernel_gradient(*block, kernel.shape), None

    # Not `zeros`: under `shard_map` this must vary from device to device, as the sum does.
    zero = 0 * kernel.astype(_sum_dtype(kernel))
    dkernel, _ = lax.scan(add, zero, (split(x), split(g)))
    return dx, dkernel.astype(kernel.dtype)


_valid_conv.defvjp(_valid_conv_fwd, _valid_conv_bwd)


def _plan(x, kernel):
    """The forms that suit the shapes, and the function that splits a batch into blocks.

    A batch that no good block size divides is filled up with zeros, which add nothing to sums.
    """
    batch, h, w, c = x.shape
    kh, kw, _, features = kernel.shape
    # A product over fewer than 32 numbers starves the matrix units: take all kernel rows at once.
    if kw * c < 32:
        forward, kernel_gradient, depth = _forward_full, _kernel_gradient_full, kh * kw * c
    else:
        forward, kernel_gradient, depth = _forward_rows, _kernel_gradient_rows, kw * c

    bytes_per_image = h * w * (depth + features) * x.dtype.itemsize
    size = max(1, batch)
    if batch * bytes_per_image > _UNSPLIT_BYTES:
        most = min(batch, max(1, _BLOCK_BYTES // bytes_per_image))
        divisor = max(n for n in range(1, most + 1) if batch % n == 0)
        size = divisor if 2 * divisor >= most else most
    blocks = -(-batch // size)

    def split(a):
        filled = jnp.pad(a, ((0, blocks * size - batch), *((0, 0) for _ in a.shape[1:])))
        return filled.reshape(blocks, size, *a.shape[1:])

    return forward, kernel_gradient, split


def _sum_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=_sum_dtype(a))


def _full_patches(x, kh, kw):
    """[B, H, W, C] to [B, OH, OW, KH·KW·C]: KH·KW times the input's bytes."""
    oh, ow = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    taps = [x[:, i : i + oh, j : j + ow] for i in range(kh) for j in range(kw)]
    return jnp.concatenate(taps, axis=-1)


def _forward_full(x, kernel):
    """One product of depth KH·KW·C: right where the depth is small (the first layer)."""
    kh, kw, _, features = kernel.shape
    y = _dot(_full_patches(x, kh, kw), kernel.reshape(-1, features))
    return y.astype(x.dtype)


def _kernel_gradient_full(x, g, shape):
    kh, kw, c, features = shape
    patches = _full_patches(x, kh, kw).reshape(-1, kh * kw * c)
    return _dot(patches.T, g.reshape(-1, features)).reshape(shape)


def _row_patches(x, kw):
    """[B, H, W, C] to [H, B, OW, KW·C]: KW times the input's bytes.

    With the height leading, the rows that one kernel row meets are one contiguous piece, so
    that the products read it in place.
    """
    ow = x.shape[2] - kw + 1
    x = x.swapaxes(0, 1)
    return jnp.concatenate([x[:, :, j : j + ow] for j in range(kw)], axis=-1)


def _forward_rows(x, kernel):
    """KH products of depth KW·C, summed: a KH-th of the patches' memory traffic."""
    kh, kw, c, features = kernel.shape
    patches = _row_patches(x, kw)
    oh = x.shape[1] - kh + 1
    y = sum(
        _dot(patches[i : i + oh].reshape(-1, kw * c), kernel[i].reshape(-1, features))
        for i in range(kh)
    )
    return y.astype(x.dtype).reshape(oh, *patches.shape[1:3], features).swapaxes(0, 1)


def _kernel_gradient_rows(x, g, shape):
    kh, kw, c, features = shape
    patches = _row_patches(x, kw)
    oh = x.shape[1] - kh + 1
    g = g.swapaxes(0, 1).reshape(-1, features)
    rows = [_dot(patches[i : i + oh].reshape(-1, kw * c).T, g) for i in range(kh)]
    return jnp.stack(rows).reshape(shape)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """2×2 max-pooling with stride 2 of [B, H, W, C]; an odd last row or column is left out.

    Values and gradients are `flax.linen.max_pool(x, (2, 2), (2, 2))`'s: of equal numbers the
    first in row-major order gets the gradient. What is kept for the gradient is one byte an
    output, where XLA's own gradient keeps and scans the whole input again.

    Raises:
        UserError: the image is smaller than 2×2.
    """
    return _max_pool_fwd(x)[0]


def _max_pool_fwd(x):
    h, w = x.shape[1:3]
    if min(h, w) < 2:
        raise UserError(
            f"images are too small for this network: {h}×{w} pixels reach a 2×2 max-pool; "
            "use larger images."
        )
    a, b, c, d = (x[:, i : h // 2 * 2 : 2, j : w // 2 * 2 : 2] for i in (0, 1) for j in (0, 1))
    top, bottom = jnp.maximum(a, b), jnp.maximum(c, d)
    first = jnp.where(top >= bottom, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    # The empty array tells the gradient the height and width, which odd sizes would lose.
    return jnp.maximum(top, bottom), (first.astype(jnp.uint8), jnp.empty((0, h, w)))


def _max_pool_bwd(residuals, g):
    first, empty = residuals
    h, w = empty.shape[1:]
    batch, oh, ow, channels = g.shape
    position = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    dx = jnp.where(first[:, :, None, :, None] == position, g[:, :, None, :, None], 0)
    dx = dx.reshape(batch, 2 * oh, 2 * ow, channels)
    return (jnp.pad(dx, ((0, 0), (0, h - 2 * oh), (0, w - 2 * ow), (0, 0))),)


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)
