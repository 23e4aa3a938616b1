"""Convolutions as matrix products, over blocks of the batch that stay in a CPU core's cache.

| convolution | form | multiplications |
|---|---|---|
| 3×3 to 5×5, 32 channels and features or more | `winograd.conv_relu` | 4/25 to 4/9 |
| other 3×3 of 8 or more, pooled, 16 images or more | `winograd_narrow.conv_relu_pool` | 4/9 |
| other, not pooled or in a batch of fewer than 16 | `_by_patches` | 1 |
| other, and all of 16 bits | `side_by_side.conv_relu` | 1 to 16/9 |

The last column is relative to direct convolution. In its last row the kernel's gradient, and in 16
bits all three products, have 16/9 where a pool follows a 3×3 kernel, 36/25 after a 5×5. A narrow
convolution that is not pooled, before one of the first row, is computed block by block in the
latter's loop (`conv_pair.py`).

`benchmarks/NOTES.md` has the measurements behind this table. All have gradients written out:
autodiff would turn the gradient of patches into KH·KW padded additions over the whole input.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mnist_flax import pooling, side_by_side, tiles, winograd, winograd_narrow

# Bytes of patches and outputs that one product may touch: a core's L2 cache holds as many or twice
# as many.
_BLOCK_BYTES = 2**20


def conv_relu(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: str) -> jax.Array:
    """As `layers.conv_relu`."""
    x = _pad(x, kernel, padding)
    if winograd.suits(x, kernel):
        return winograd.conv_relu(x, kernel, bias, pool=False)
    if x.dtype.itemsize >= 4:
        return _by_patches(x, kernel, bias)
    return side_by_side.conv_relu(x, kernel, bias, pool_size=1)


def conv_relu_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: str) -> jax.Array:
    """As `layers.conv_relu_pool`."""
    x = _pad(x, kernel, padding)
    if winograd.suits(x, kernel):
        return winograd.conv_relu(x, kernel, bias, pool=True)
    if winograd_narrow.suits(x, kernel):
        return winograd_narrow.conv_relu_pool(x, kernel, bias)
    if x.dtype.itemsize >= 4 and not tiles.is_split(len(x)):
        return pooling.max_pool(_by_patches(x, kernel, bias))
    return side_by_side.conv_relu(x, kernel, bias, pool_size=2)


def _pad(x, kernel, padding):
    if padding == "VALID":
        return x
    return jnp.pad(x, ((0, 0), *(((k - 1) // 2, k // 2) for k in kernel.shape[:2]), (0, 0)))


@jax.custom_vjp
def _by_patches(x, kernel, bias):
    """ReLU of a 'valid' convolution as one product of depth KH·KW·C (im2col)."""
    return _by_patches_fwd(x, kernel, bias)[0]


def _by_patches_fwd(x, kernel, bias):
    split = _splitter(x, kernel)

    def forward(block):
        y = conv_relu_by_patches(block, kernel, bias)
        return y, y > 0

    y, positive = (tiles.join(blocks, len(x)) for blocks in lax.map(forward, split(x)))
    return y, (x, kernel, bias, positive)


def _by_patches_bwd(residuals, g):
    x, kernel, bias, positive = residuals
    full, flipped = _for_input_gradient(kernel, jnp.where(positive, g, 0))
    blocks = _splitter(full, flipped)(full)
    dx = tiles.join(lax.map(lambda block: _convolved(block, flipped), blocks), len(x))

    def add(totals, block):
        x, positive, g = block
        # Once more, so that a first layer, which needs no dx, never keeps the whole.
        dkernel, dbias = weight_gradients(x, kernel, jnp.where(positive, g, 0))
        return (totals[0] + dkernel, totals[1] + dbias), None

    split = _splitter(x, kernel)
    start = (tiles.zero(kernel), tiles.zero(bias))
    (dkernel, dbias), _ = lax.scan(add, start, (split(x), split(positive), split(g)))
    return dx, dkernel, dbias


_by_patches.defvjp(_by_patches_fwd, _by_patches_bwd)


def conv_relu_by_patches(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """ReLU of a 'valid' convolution and bias, of one block of images."""
    return jax.nn.relu(_convolved(x, kernel) + bias)


def weight_gradients(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of kernel and bias by one block, from that of the sums before the ReLU."""
    features = kernel.shape[3]
    patches = _patches(x, kernel).reshape(-1, kernel.size // features)
    dkernel = tiles.dot(patches.T, g.reshape(-1, features)).reshape(kernel.shape)
    return dkernel, g.sum((0, 1, 2))


def input_gradient(kernel: jax.Array, g: jax.Array) -> jax.Array:
    """The gradient of one block of images, from that of the sums before the ReLU."""
    return _convolved(*_for_input_gradient(kernel, g))


def _for_input_gradient(kernel, g):
    """What to convolve with what."""
    kh, kw = kernel.shape[:2]
    full = jnp.pad(g, ((0, 0), (kh - 1, kh - 1), (kw - 1, kw - 1), (0, 0)))
    return full, jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _convolved(x, kernel):
    patches = _patches(x, kernel)
    return tiles.dot(patches, kernel.reshape(-1, kernel.shape[3]))


def _patches(x, kernel):
    """[B, H, W, C] to [B, OH, OW, KH·KW·C]: KH·KW times the input's bytes."""
    kh, kw = kernel.shape[:2]
    oh, ow = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    pixels = [x[:, i : i + oh, j : j + ow] for i in range(kh) for j in range(kw)]
    return jnp.concatenate(pixels, axis=-1)


def _splitter(x, kernel):
    batch, h, w, _ = x.shape
    numbers = kernel.size // kernel.shape[3] + kernel.shape[3]
    return tiles.splitter(batch, _BLOCK_BYTES // (h * w * numbers * x.dtype.itemsize))
