"""Convolutions as matrix products, over blocks of the batch that stay in a CPU core's cache.

| convolution | form | products |
|---|---|---|
| 3×3 to 5×5, 32 channels and features or more, float32 | `winograd.conv_relu` | 4/25 to 4/9 |
| other, pooled | `_tiled_conv_relu_pool`, 2×2 outputs at a time | up to 16/9, but deep and wide |
| other, KW·C < 32 | `_forward_full`: patches of KH·KW·C | all |
| other | `_forward_rows`: patches of KW·C, a kernel row at a time | all |

`benchmarks/NOTES.md` has the measurements behind this table. All have gradients written out:
autodiff would turn the gradient of patches into KH·KW padded additions over the whole input.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mnist_flax import tiles, winograd

# Bytes of patches and outputs that one product may touch: half of a core's L2 cache.
_BLOCK_BYTES = 2**20
# Numbers in a vector register: products with whole vectors of columns take less time.
_LANES = 16


def conv_relu(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: str) -> jax.Array:
    """As `layers.conv_relu`."""
    x = _pad(x, kernel, padding)
    if winograd.suits(x, kernel):
        return winograd.conv_relu(x, kernel, bias, False)
    return _patched_conv_relu(x, kernel, bias)


def conv_relu_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: str) -> jax.Array:
    """As `layers.conv_relu_pool`."""
    x = _pad(x, kernel, padding)
    if winograd.suits(x, kernel):
        return winograd.conv_relu(x, kernel, bias, True)
    return _tiled_conv_relu_pool(x, kernel, bias)


def _pad(x, kernel, padding):
    if padding == "VALID":
        return x
    return jnp.pad(x, ((0, 0), *(((k - 1) // 2, k // 2) for k in kernel.shape[:2]), (0, 0)))


@jax.custom_vjp
def _patched_conv_relu(x, kernel, bias):
    """ReLU of a 'valid' convolution by patches; the input's gradient is another convolution."""
    return _patched_conv_relu_fwd(x, kernel, bias)[0]


def _patched_conv_relu_fwd(x, kernel, bias):
    forward, _, split = _plan(x, kernel)

    def finished(block):
        y = jax.nn.relu(forward(block, kernel) + bias)
        return y, y > 0

    y, positive = (tiles.join(blocks, len(x)) for blocks in lax.map(finished, split(x)))
    return y, (x, kernel, bias, positive)


def _patched_conv_relu_bwd(residuals, g):
    x, kernel, bias, positive = residuals
    kh, kw = kernel.shape[:2]

    full = jnp.pad(jnp.where(positive, g, 0), ((0, 0), (kh - 1, kh - 1), (kw - 1, kw - 1), (0, 0)))
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    forward, _, split = _plan(full, flipped)
    dx = tiles.join(lax.map(lambda block: forward(block, flipped), split(full)), len(x))

    _, kernel_gradient, split = _plan(x, kernel)

    def add(totals, block):
        x, positive, g = block
        # Once more, so that a first layer, which needs no dx, never keeps the whole.
        g = jnp.where(positive, g, 0)
        dkernel, dbias = totals
        dbias += g.sum((0, 1, 2), dtype=dbias.dtype)
        return (dkernel + kernel_gradient(x, g, kernel.shape), dbias), None

    start = (tiles.zero(kernel), tiles.zero(bias))
    (dkernel, dbias), _ = lax.scan(add, start, (split(x), split(positive), split(g)))
    return dx, dkernel.astype(kernel.dtype), dbias.astype(bias.dtype)


_patched_conv_relu.defvjp(_patched_conv_relu_fwd, _patched_conv_relu_bwd)


@jax.custom_vjp
def _tiled_conv_relu_pool(x, kernel, bias):
    """2×2 max-pool and ReLU of a 'valid' convolution, a pool's four outputs as one row.

    The tile of the input that a pool sees, (KH + 1)×(KW + 1), meets the kernel in its four
    places. Compared with patches that is up to 16/9 of the arithmetic for a 3×3 kernel, but
    4/9 of the memory, deeper and wider products, and a pool over neighbouring vectors.
    """
    return _tiled_conv_relu_pool_fwd(x, kernel, bias)[0]


def _tiled_conv_relu_pool_fwd(x, kernel, bias):
    kh, kw = kernel.shape[:2]
    split = _tile_split(x, kernel)
    matrix, filled_bias = _tile_kernel(kernel), _fill_lanes(bias)

    def forward(block):
        patches, shape = _tile_patches(block, kh, kw)
        y = tiles.dot(patches, matrix).astype(x.dtype)
        y, choice = tiles.relu_pool(*jnp.split(y, 4, axis=1), filled_bias)
        return y.reshape(*shape, -1), choice.reshape(*shape, -1)

    y, choice = (tiles.join(blocks, len(x)) for blocks in lax.map(forward, split(x)))
    return y[..., : len(bias)], (x, kernel, choice)


def _tiled_conv_relu_pool_bwd(residuals, g):
    x, kernel, choice = residuals
    kh, kw = kernel.shape[:2]
    split = _tile_split(x, kernel)
    matrix = _tile_kernel(kernel)
    dbias = jnp.where(choice[..., : g.shape[3]] < 4, g, 0).sum((0, 1, 2))

    def backward(total, block):
        x, choice, g = block
        patches, shape = _tile_patches(x, kh, kw)
        # Concatenated, as XLA does not vectorise one comparison with a reshaped axis of four.
        dy = jnp.concatenate([jnp.where(choice == i, g, 0) for i in range(4)], axis=-1)
        dy = dy.reshape(len(patches), -1)
        dtiles = tiles.dot(dy, matrix.T).reshape(*shape, kh + 1, kw + 1, -1)
        dx = tiles.add(dtiles, 2, *x.shape[1:3])
        return total + tiles.dot(patches.T, dy), dx.astype(x.dtype)

    blocks = (split(x), split(choice), split(_fill_lanes(g)))
    dmatrix, dx = lax.scan(backward, tiles.zero(matrix), blocks)
    (dkernel,) = jax.linear_transpose(_tile_kernel, kernel)(dmatrix.astype(kernel.dtype))
    return tiles.join(dx, len(x)), dkernel, dbias


_tiled_conv_relu_pool.defvjp(_tiled_conv_relu_pool_fwd, _tiled_conv_relu_pool_bwd)


def _tile_patches(x, kh, kw):
    """The (KH + 1)×(KW + 1) tiles under 2×2 outputs: [B, H, W, C] to [B·OH·OW, depth].

    Also the shape (B, OH, OW) of the pooled output.
    """
    oh, ow = (x.shape[1] - kh + 1) // 2, (x.shape[2] - kw + 1) // 2
    patches = jnp.concatenate(tiles.taps(x, (kh + 1, kw + 1), (oh, ow), 2), axis=-1)
    return patches.reshape(-1, patches.shape[-1]), patches.shape[:3]


def _tile_kernel(kernel):
    """The kernel in its four places in a tile: [KH, KW, C, F] to [(KH + 1)·(KW + 1)·C, 4·F'].

    F' is F filled up to whole vectors.
    """
    kernel = _fill_lanes(kernel)
    places = [
        jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in (0, 1) for j in (0, 1)
    ]
    return jnp.stack(places, axis=3).reshape(-1, 4 * kernel.shape[3])


def _fill_lanes(x):
    """The last axis filled up with zeros to whole vectors."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _LANES)])


def _tile_split(x, kernel):
    _, h, w, c = x.shape
    kh, kw, _, features = kernel.shape
    features = -(-features // _LANES) * _LANES
    numbers = (kh + 1) * (kw + 1) * c + 4 * features
    count = (h - kh + 1) // 2 * ((w - kw + 1) // 2)
    return tiles.splitter(len(x), count * numbers * x.dtype.itemsize, _BLOCK_BYTES)


def _plan(x, kernel):
    """The forms that suit the shapes, and the function that splits a batch into blocks."""
    batch, h, w, c = x.shape
    kh, kw, _, features = kernel.shape
    # A product over fewer than 32 numbers starves the matrix units: take all kernel rows at once.
    if kw * c < 32:
        forward, kernel_gradient, depth = _forward_full, _kernel_gradient_full, kh * kw * c
    else:
        forward, kernel_gradient, depth = _forward_rows, _kernel_gradient_rows, kw * c
    bytes_per_image = h * w * (depth + features) * x.dtype.itemsize
    return forward, kernel_gradient, tiles.splitter(batch, bytes_per_image, _BLOCK_BYTES)


def _full_patches(x, kh, kw):
    """[B, H, W, C] to [B, OH, OW, KH·KW·C]: KH·KW times the input's bytes."""
    oh, ow = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    return jnp.concatenate(tiles.taps(x, (kh, kw), (oh, ow), 1), axis=-1)


def _forward_full(x, kernel):
    """One product of depth KH·KW·C: right where the depth is small (the first layer)."""
    kh, kw, _, features = kernel.shape
    y = tiles.dot(_full_patches(x, kh, kw), kernel.reshape(-1, features))
    return y.astype(x.dtype)


def _kernel_gradient_full(x, g, shape):
    kh, kw, c, features = shape
    patches = _full_patches(x, kh, kw).reshape(-1, kh * kw * c)
    return tiles.dot(patches.T, g.reshape(-1, features)).reshape(shape)


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
        tiles.dot(patches[i : i + oh].reshape(-1, kw * c), kernel[i].reshape(-1, features))
        for i in range(kh)
    )
    return y.astype(x.dtype).reshape(oh, *patches.shape[1:3], features).swapaxes(0, 1)


def _kernel_gradient_rows(x, g, shape):
    kh, kw, c, features = shape
    patches = _row_patches(x, kw)
    oh = x.shape[1] - kh + 1
    g = g.swapaxes(0, 1).reshape(-1, features)
    rows = [tiles.dot(patches[i : i + oh].reshape(-1, kw * c).T, g) for i in range(kh)]
    return jnp.stack(rows).reshape(shape)
