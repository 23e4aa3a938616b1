"""Convolutions as matrix products, over blocks of the batch that stay in a CPU core's cache.

| convolution | form | products |
|---|---|---|
| 3×3 to 5×5, 32 channels and features or more, float32 | `_winograd` | a ninth to a quarter |
| other, pooled | `_tiled_conv_pool`, 2×2 outputs at a time | up to 16/9, but deep and wide |
| other, KW·C < 32 | `_forward_full`: patches of KH·KW·C | all |
| other | `_forward_rows`: patches of KW·C, a kernel row at a time | all |

`benchmarks/NOTES.md` has the measurements behind this table. All have gradients written out:
autodiff would turn the gradient of patches into KH·KW padded additions over the whole input.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Bytes of patches and outputs that one product may touch: half of a core's L2 cache.
_BLOCK_BYTES = 2**20
# The same for Winograd's, with its several products: all of that cache.
_WINOGRAD_BYTES = 2 * 2**20
# Numbers in a vector register: products with whole vectors of columns take less time.
_LANES = 16


def conv(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
    """As `layers.conv`."""
    x = _pad(x, kernel, padding)
    return _winograd(x, kernel, False) if _suits_winograd(x, kernel) else _valid_conv(x, kernel)


def conv_pool(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
    """As `layers.conv_pool`."""
    x, features = _pad(x, kernel, padding), kernel.shape[3]
    if _suits_winograd(x, kernel):
        return _winograd(x, kernel, True)
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, -features % _LANES)))
    return _tiled_conv_pool(x, kernel)[..., :features]


def _pad(x, kernel, padding):
    if padding == "VALID":
        return x
    return jnp.pad(x, ((0, 0), *(((k - 1) // 2, k // 2) for k in kernel.shape[:2]), (0, 0)))


@jax.custom_vjp
def _valid_conv(x, kernel):
    """'Valid' convolution as matrix products over blocks of the batch.

    The gradients are written out: autodiff would turn the patches' gradient into KH·KW padded
    additions over the whole input, where a second convolution needs one pass.
    """
    forward, _, split = _plan(x, kernel)
    blocks = lax.map(lambda block: forward(block, kernel), split(x))
    return _join(blocks, len(x))


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

    dkernel, _ = lax.scan(add, _zero(kernel), (split(x), split(g)))
    return dx, dkernel.astype(kernel.dtype)


_valid_conv.defvjp(_valid_conv_fwd, _valid_conv_bwd)


@jax.custom_vjp
def _tiled_conv_pool(x, kernel):
    """2×2 max-pool of a 'valid' convolution, a pool's four outputs as one row of a product.

    The tile of the input that a pool sees, (KH + 1)×(KW + 1), meets the kernel in its four
    places. Compared with patches that is up to 16/9 of the arithmetic for a 3×3 kernel, but
    4/9 of the memory, deeper and wider products, and a pool over neighbouring vectors.
    """
    return _tiled_conv_pool_fwd(x, kernel)[0]


def _tiled_conv_pool_fwd(x, kernel):
    kh, kw = kernel.shape[:2]
    split = _tile_split(x, kernel)
    matrix = _tile_kernel(kernel)

    def forward(block):
        tiles, shape = _tiles(block, kh, kw)
        y = _dot(tiles, matrix).astype(x.dtype)
        pooled, first = first_of_largest(*jnp.split(y, 4, axis=1))
        return pooled.reshape(*shape, -1), first.reshape(*shape, -1)

    pooled, first = (_join(blocks, len(x)) for blocks in lax.map(forward, split(x)))
    return pooled, (x, kernel, first)


def _tiled_conv_pool_bwd(residuals, g):
    x, kernel, first = residuals
    kh, kw = kernel.shape[:2]
    split = _tile_split(x, kernel)
    matrix = _tile_kernel(kernel)

    def backward(total, block):
        x, first, g = block
        tiles, shape = _tiles(x, kh, kw)
        # Concatenated, as XLA does not vectorise one comparison with a reshaped axis of four.
        dy = jnp.concatenate([jnp.where(first == i, g, 0) for i in range(4)], axis=-1)
        dy = dy.reshape(len(tiles), -1)
        dtiles = _dot(dy, matrix.T).reshape(*shape, kh + 1, kw + 1, -1)
        dx = _add_tiles(dtiles, 2, *x.shape[1:3])
        return total + _dot(tiles.T, dy), dx.astype(x.dtype)

    dmatrix, dx = lax.scan(backward, _zero(matrix), (split(x), split(first), split(g)))
    (dkernel,) = jax.linear_transpose(_tile_kernel, kernel)(dmatrix.astype(kernel.dtype))
    return _join(dx, len(x)), dkernel


_tiled_conv_pool.defvjp(_tiled_conv_pool_fwd, _tiled_conv_pool_bwd)


def _tiles(x, kh, kw):
    """The (KH + 1)×(KW + 1) tiles under 2×2 outputs: [B, H, W, C] to [B·OH·OW, depth].

    Also the shape (B, OH, OW) of the pooled output.
    """
    oh, ow = (x.shape[1] - kh + 1) // 2, (x.shape[2] - kw + 1) // 2
    tiles = jnp.concatenate(_taps(x, (kh + 1, kw + 1), (oh, ow), 2), axis=-1)
    return tiles.reshape(-1, tiles.shape[-1]), tiles.shape[:3]


def _taps(x, size, count, stride):
    """The first, second, ... pixel of all tiles, each [B, *count, C], in row-major order."""
    return [
        x[:, i : i + stride * count[0] : stride, j : j + stride * count[1] : stride]
        for i in range(size[0])
        for j in range(size[1])
    ]


def _add_tiles(tiles, stride, h, w):
    """The transpose of cutting tiles: [B, TH, TW, NH, NW, C] summed into [B, h, w, C].

    A tile is taken as squares of stride × stride pixels, which lie on the same grid for all
    tiles: tiles of 4×4 at stride 2 have four, so that four additions of whole images do.
    """
    batch, th, tw, nh, nw, c = tiles.shape
    sh, sw = -(-nh // stride), -(-nw // stride)
    filling = ((0, sh * stride - nh), (0, sw * stride - nw))
    squares = jnp.pad(tiles, (*[(0, 0)] * 3, *filling, (0, 0)))
    squares = squares.reshape(batch, th, tw, sh, stride, sw, stride, c)
    places = [((i, sh - 1 - i), (j, sw - 1 - j)) for i in range(sh) for j in range(sw)]
    grid = sum(
        jnp.pad(squares[:, :, :, row[0], :, column[0]], ((0, 0), row, column, *[(0, 0)] * 3))
        for row, column in places
    )
    x = grid.swapaxes(2, 3).reshape(batch, stride * (th + sh - 1), stride * (tw + sw - 1), c)
    return _fit(x, h, w)


def _fit(x, h, w):
    """[B, H, W, C] cut or filled up with zeros to [B, h, w, C]."""
    x = jnp.pad(x, ((0, 0), (0, max(0, h - x.shape[1])), (0, max(0, w - x.shape[2])), (0, 0)))
    return x[:, :h, :w]


def _tile_kernel(kernel):
    """The kernel in its four places in a tile: [KH, KW, C, F] to [(KH + 1)·(KW + 1)·C, 4·F]."""
    places = [
        jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in (0, 1) for j in (0, 1)
    ]
    return jnp.stack(places, axis=3).reshape(-1, 4 * kernel.shape[3])


def _suits_winograd(x, kernel):
    # In bfloat16 its transforms lose too much; narrow layers have too few products to save.
    kh, kw, c, features = kernel.shape
    return (
        x.dtype == jnp.float32 and min(c, features) >= 32 and 3 <= min(kh, kw) <= max(kh, kw) <= 5
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _winograd(x, kernel, pool):
    """'Valid' convolution by Winograd's minimal filtering, 2×2 max-pooled with `pool`.

    Lavin & Gray, 2016: tiles of the input and the kernel are transformed so that m×m outputs
    take (m + KH - 1)·(m + KW - 1) products instead of m²·KH·KW, a ninth to a quarter of them
    here: 64 instead of 400 for 4×4 outputs of a 5×5 kernel. The transforms cost a few units in
    the last place: at 5×5 an error of about 1e-5 of the largest output.
    """
    return _winograd_fwd(x, kernel, pool)[0]


def _winograd_fwd(x, kernel, pool):
    plan = _winograd_plan(x, kernel, pool)
    weights = _transformed_kernel(kernel, plan)

    def forward(block):
        products = jnp.matmul(_transformed_tiles(block, plan), weights)
        y = _dot(plan.output, products.reshape(len(products), -1))
        y = y.reshape(plan.m // 2, 2, plan.m // 2, 2, -1, kernel.shape[3])
        if not pool:
            return _from_output_tiles(y.reshape(plan.m, plan.m, *y.shape[4:]), plan), None
        pooled, first = first_of_largest(*(y[:, i, :, j] for i in (0, 1) for j in (0, 1)))
        return _from_output_tiles(pooled, plan), first

    blocks, first = lax.map(forward, plan.split(x))
    return _join(blocks, len(x)), (x, kernel, first)


def _winograd_bwd(pool, residuals, g):
    x, kernel, first = residuals
    plan = _winograd_plan(x, kernel, pool)
    weights = _transformed_kernel(kernel, plan)
    m, features = plan.m, kernel.shape[3]

    def backward(total, block):
        x, first, g = block
        dy = _to_output_tiles(g, plan)
        if pool:
            places = [(i // 2, j // 2, i % 2 * 2 + j % 2) for i in range(m) for j in range(m)]
            dy = jnp.stack([jnp.where(first[i, j] == place, dy[i, j], 0) for i, j, place in places])
        dproducts = _dot(plan.output.T, dy.reshape(m * m, -1)).reshape(len(weights), -1, features)
        dweights = jnp.matmul(_transformed_tiles(x, plan).swapaxes(1, 2), dproducts)
        dtiles = jnp.matmul(dproducts, weights.swapaxes(1, 2))
        dtiles = _dot(plan.input.T, dtiles.reshape(len(weights), -1))
        dtiles = dtiles.reshape(*plan.size, len(x), *plan.count, -1).transpose(2, 3, 4, 0, 1, 5)
        return total + dweights, _add_tiles(dtiles, m, *x.shape[1:3])

    dweights, dx = lax.scan(backward, _zero(weights), (plan.split(x), first, plan.split(g)))
    dkernel = _dot(plan.kernel.T, dweights.reshape(len(weights), -1)).reshape(kernel.shape)
    return _join(dx, len(x)), dkernel


_winograd.defvjp(_winograd_fwd, _winograd_bwd)


class _WinogradPlan(NamedTuple):
    """How a convolution is cut into tiles.

    Attributes:
        m: outputs of a tile are m×m.
        size: (NH, NW) of a tile.
        count: (TH, TW), tiles of an image.
        out: (OH, OW) of the result.
        q: a tile gives q×q numbers of the result: m, or half of it after a pool.
        output, kernel, input: the constant matrices, [m², n], [n, KH·KW], [n, n] with n = NH·NW.
        split: cuts a batch into blocks.
    """

    m: int
    size: tuple[int, int]
    count: tuple[int, int]
    out: tuple[int, int]
    q: int
    output: np.ndarray
    kernel: np.ndarray
    input: np.ndarray
    split: Callable[[jax.Array], jax.Array]


def _winograd_plan(x, kernel, pool):
    kh, kw, c, features = kernel.shape
    h, w = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    m = 4 if min(h, w) >= 16 else 2
    out, q = ((h // 2, w // 2), m // 2) if pool else ((h, w), m)
    count = tuple(-(-n // q) for n in out)
    size = (m + kh - 1, m + kw - 1)
    numbers = math.prod(size) * math.prod(count) * 2 * (c + features)
    split = _splitter(len(x), numbers * x.dtype.itemsize, _WINOGRAD_BYTES)
    return _WinogradPlan(m, size, count, out, q, *_winograd_matrices(m, kh, kw), split)


@cache
def _winograd_matrices(m, kh, kw):
    """Output, kernel and input matrices for m×m outputs, rows and columns in one (Kronecker).

    By Cook and Toom: polynomials are multiplied as their values at as many points as the product
    has coefficients, the last of them infinity. A convolution is the transpose of that.
    """

    def one(k):
        n = m + k - 1

        def values(count):
            powers = np.vander([0, 1, -1, 2, -2, 1 / 2, -1 / 2][: n - 1], count, increasing=True)
            return np.vstack([powers, np.eye(count)[-1]])

        return values(m).T, values(k), np.linalg.inv(values(n)).T

    return tuple(np.kron(a, b).astype(np.float32) for a, b in zip(one(kh), one(kw), strict=True))


def _transformed_kernel(kernel, plan):
    """[KH, KW, C, F] to [n, C, F]."""
    kh, kw, c, features = kernel.shape
    return _dot(plan.kernel, kernel.reshape(kh * kw, -1)).reshape(-1, c, features)


def _transformed_tiles(x, plan):
    """[B, H, W, C] to [n, B·TH·TW, C]."""
    h, w = (plan.m * t + n - plan.m for t, n in zip(plan.count, plan.size, strict=True))
    taps = jnp.stack(_taps(_fit(x, h, w), plan.size, plan.count, plan.m))
    return _dot(plan.input, taps.reshape(len(taps), -1)).reshape(len(taps), -1, x.shape[3])


def _from_output_tiles(tiles, plan):
    """[q, q, B·TH·TW, F] to [B, OH, OW, F]."""
    q, (th, tw) = plan.q, plan.count
    y = tiles.reshape(q, q, -1, th, tw, tiles.shape[-1]).transpose(2, 3, 0, 4, 1, 5)
    return _fit(y.reshape(-1, th * q, tw * q, y.shape[-1]), *plan.out)


def _to_output_tiles(y, plan):
    """The transpose of `_from_output_tiles`."""
    q, (th, tw) = plan.q, plan.count
    y = _fit(y, th * q, tw * q).reshape(-1, th, q, tw, q, y.shape[3])
    return y.transpose(2, 4, 0, 1, 3, 5).reshape(q, q, -1, y.shape[-1])


def _tile_split(x, kernel):
    _, h, w, c = x.shape
    kh, kw, _, features = kernel.shape
    numbers = (kh + 1) * (kw + 1) * c + 4 * features
    tiles = (h - kh + 1) // 2 * ((w - kw + 1) // 2)
    return _splitter(len(x), tiles * numbers * x.dtype.itemsize, _BLOCK_BYTES)


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
    return forward, kernel_gradient, _splitter(batch, bytes_per_image, _BLOCK_BYTES)


def _splitter(batch, bytes_per_image, block_bytes):
    """A function from [B, ...] to [blocks, block, ...] with blocks of at most so many bytes.

    A batch that no good block size divides is filled up with zeros, which add nothing to sums.
    """
    most = min(max(1, batch), max(1, block_bytes // bytes_per_image))
    divisor = max(n for n in range(1, most + 1) if batch % n == 0)
    size = divisor if 2 * divisor >= most else most
    blocks = -(-batch // size)

    def split(a):
        filled = jnp.pad(a, ((0, blocks * size - batch), *((0, 0) for _ in a.shape[1:])))
        return filled.reshape(blocks, size, *a.shape[1:])

    return split


def _join(blocks, batch):
    return blocks.reshape(-1, *blocks.shape[2:])[:batch]


def _zero(x):
    # Not `zeros`: under `shard_map` a sum must vary from device to device from its start on.
    return 0 * x.astype(_sum_dtype(x))


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


def first_of_largest(a, b, c, d):
    """The largest of four arrays and, as uint8, which of them has it first."""
    top, bottom = jnp.maximum(a, b), jnp.maximum(c, d)
    first = jnp.where(top >= bottom, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    return jnp.maximum(top, bottom), first.astype(jnp.uint8)
