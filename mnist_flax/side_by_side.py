"""Convolutions with the pixels of several images side by side: [C, H, W, images].

Whatever is cut out, moved, compared or added then comes in long runs, however few channels there
are, and each operand of the products lies as the product reads it.

The four outputs under one 2×2 pool see the same tile of (KH + 1)×(KW + 1) pixels, with the kernel
at four places in it. Tiles are cut once, 2 pixels apart; the forward pass and the input's gradient
make a product for each place, so that the pool compares four whole arrays. The tiles come from
strips of whole rows of them, so that runs are long and the few images of a block, whose tiles stay
in the cache, are enough. The kernel's gradient is one product of all places with whole tiles: 16/9
of the arithmetic for 3×3, but products of one place would be too narrow. In 16 bits, where products
take less time than copies, the forward pass and the input's gradient are one such product too.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mnist_flax import pooling, tiles

# Images side by side in a block: fewer make the runs short, more leave the cache. It depends on
# nothing but the batch, so that two layers in succession have the same blocks, and XLA drops what
# would arrange them by image in between.
_IMAGES = 5
# Of a batch that those do not divide: a power of two would have four, and with those be slower.
_MAX_IMAGES = 8


def conv_relu(x: jax.Array, kernel: jax.Array, bias: jax.Array, pool_size: int) -> jax.Array:
    """ReLU of a 'valid' convolution of x [B, H, W, C], max-pooled by `pool_size`, 1 or 2."""
    return in_blocks(lambda x: _blocks(x, kernel, bias, pool_size), x)


def in_blocks(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """A function of [blocks, C, H, W, images], such as a layer, of x [B, H, W, C]."""
    split = tiles.splitter(len(x), _MAX_IMAGES if len(x) % _IMAGES else _IMAGES)
    return tiles.join(_swap(function(_swap(split(x)))), len(x))


def _swap(blocks):
    """[blocks, images, H, W, C] to [blocks, C, H, W, images], and back."""
    return blocks.swapaxes(1, 4)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocks(x, kernel, bias, pool_size):
    """ReLU of a 'valid' convolution of x [blocks, C, H, W, images], max-pooled."""
    return _blocks_fwd(x, kernel, bias, pool_size)[0]


def _blocks_fwd(x, kernel, bias, pool_size):
    y, choice = _through_bits(partial(_forward, pool_size), x, kernel, bias)
    return y, (x, kernel, bias, choice)


def _forward(pool_size, bits, x, kernel, bias):
    # Where there is one block only, XLA would fold the transpose into the product, which it cannot
    # make of bfloat16 then ("Unsupported element type", JAX 0.10.2).
    windows, matrix = _products(kernel, pool_size)
    matrix = lax.optimization_barrier(matrix.T)
    wide_bias = bias.astype(tiles.sum_dtype(x))[:, None]
    size, count = _size(kernel, pool_size), _count(x, kernel, pool_size)

    def forward(block):
        pixels = _cut(block, size, count, pool_size).reshape(*size, x.shape[1], -1)
        columns = [_columns(pixels[window], x.dtype) for window in windows]
        y = [tiles.dot(matrix, each).reshape(-1, len(bias), each.shape[1]) for each in columns]
        y, choice = _relu_pool([place for each in y for place in each], wide_bias)
        return bits(y.astype(x.dtype)), choice

    # A row a feature: XLA's loops over many numbers are faster than those over a few images.
    y, choice = lax.map(forward, bits(x))
    return _numbers(y, x.dtype).reshape(*y.shape[:2], *count, x.shape[4]), choice


def _blocks_bwd(pool_size, residuals, g):
    return _through_bits(partial(_backward, pool_size), *residuals, g)


def _backward(pool_size, bits, x, kernel, bias, choice, g):
    windows, matrix = _products(kernel, pool_size)
    size, count = _size(kernel, pool_size), _count(x, kernel, pool_size)
    run = count[1] * x.shape[4]
    places = jnp.arange(pool_size**2, dtype=choice.dtype)[:, None, None]
    numbered = np.arange(math.prod(size)).reshape(size)

    def backward(totals, block):
        dmatrix, dbias = totals
        x_bits, choice, g_bits = block
        g = _numbers(g_bits, x.dtype).astype(tiles.sum_dtype(x)).reshape(choice.shape)
        dbias += jnp.where(choice < places.size, g, 0).sum(1)
        dy = jnp.where(choice == places, g, 0).astype(x.dtype)
        pixels = _cut(x_bits, size, count, pool_size)
        # Not `dot` with a transpose, for which XLA would make float32 of bfloat16 first.
        dmatrix += lax.dot_general(
            dy.reshape(-1, dy.shape[2]),
            _columns(pixels, x.dtype),
            (((1,), (1,)), ((), ())),
            preferred_element_type=dmatrix.dtype,
        )
        parts = [[] for _ in range(numbered.size)]
        dy = dy.reshape(len(windows), matrix.shape[1], -1)
        for window, each in zip(windows, dy, strict=True):
            seen = numbered[window].ravel()
            dcolumns = tiles.dot(matrix, each).reshape(len(seen), -1, count[0], run)
            for i, dtap in zip(seen, dcolumns, strict=True):
                parts[i].append(dtap)
        dtaps = [sum(rest, first) for first, *rest in parts]
        dx = _add(dtaps, size, pool_size, *x.shape[2:])
        return (dmatrix, dbias), bits(dx.astype(x.dtype))

    start = (tiles.zero(_in_places(kernel, pool_size)).T, tiles.zero(bias))
    (dmatrix, dbias), dx = lax.scan(backward, start, (bits(x), choice, bits(g)))
    sum_places = jax.linear_transpose(
        partial(_in_places, pool_size=pool_size), kernel.astype(dmatrix.dtype)
    )
    (dkernel,) = sum_places(dmatrix.T)
    return _numbers(dx, x.dtype), dkernel.astype(kernel.dtype), dbias.astype(bias.dtype)


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _size(kernel, pool_size):
    """Height and width of the tile that the outputs under one pool see."""
    return tuple(k + pool_size - 1 for k in kernel.shape[:2])


def _count(x, kernel, pool_size):
    """(OH, OW): tiles of blocks [blocks, C, H, W, images]."""
    sizes = zip(x.shape[2:4], _size(kernel, pool_size), strict=True)
    return tuple((n - t) // pool_size + 1 for n, t in sizes)


def _products(kernel, pool_size):
    """The window of a tile that each product reads, and the matrix that all multiply with.

    It is [pixels·C, F], of one of the kernel's places, or in 16 bits [pixels·C, pool_size²·F]
    of all.
    """
    kh, kw, _, features = kernel.shape
    if kernel.dtype.itemsize < 4:
        return [np.s_[:, :]], _in_places(kernel, pool_size)
    places = np.ndindex(pool_size, pool_size)
    return [np.s_[i : i + kh, j : j + kw] for i, j in places], kernel.reshape(-1, features)


def _in_places(kernel, pool_size):
    """The kernel in each of its places in a tile: [KH, KW, C, F] to [TH·TW·C, pool_size²·F]."""
    places = [
        jnp.pad(kernel, ((i, pool_size - 1 - i), (j, pool_size - 1 - j), (0, 0), (0, 0)))
        for i in range(pool_size)
        for j in range(pool_size)
    ]
    return jnp.stack(places, axis=3).reshape(-1, pool_size**2 * kernel.shape[3])


def _cut(x, size, count, stride):
    """Cuts x [C, H, W, images] into OH×OW tiles of `size`, `stride` pixels apart.

    First the strips that the first, second, ... pixels of all rows of tiles are, [TW, stride, C,
    H / stride, OW, images], from which the pixels of all tiles then come in long runs.

    Returns:
        The pixels of all tiles in row-major order, as the rows of a matrix [TH·TW·C, OH·OW·images].
    """
    (th, tw), ow = size, count[1]
    c, h, w, images = x.shape
    rows, columns = -(-h // stride), -(-w // stride)
    x = tiles.fit(x, rows * stride, columns * stride)
    x = x.reshape(c, rows, stride, columns, stride, images).transpose(4, 2, 0, 1, 3, 5)
    strips = [x[j % stride, :, :, :, j // stride : j // stride + ow][None] for j in range(tw)]
    lines = tiles.concatenate(strips).reshape(tw, stride, c, -1)
    pixels = []
    for i in range(th):
        first, length = i // stride * ow * images, math.prod(count) * images
        pixels.append(lines[:, i % stride, :, first : first + length].reshape(tw * c, -1))
    return tiles.concatenate(pixels)


def _columns(pixels, dtype):
    """Pixels [..., OH·OW·images] of numbers as a matrix."""
    return _numbers(pixels.reshape(-1, pixels.shape[-1]), dtype)


def _add(dtaps, size, stride, h, w, images):
    """The transpose of `_cut`: taps [C, OH, OW·images] summed into [C, h, w, images].

    They are added in place to the grid that they were cut from: what is first filled up with zeros
    XLA would add a number at a time where images come last.
    """
    c, oh, run = dtaps[0].shape
    rows, columns = -(-h // stride), -(-w // stride)
    empty = jnp.zeros_like(dtaps[0], shape=(c, rows, columns * images))
    grids = {phase: empty for phase in np.ndindex(stride, stride)}
    for (i, j), dtap in zip(np.ndindex(*size), dtaps, strict=True):
        phase, first = (i % stride, j % stride), (0, i // stride, j // stride * images)
        sums = lax.dynamic_slice(grids[phase], first, (c, oh, run)) + dtap
        grids[phase] = lax.dynamic_update_slice(grids[phase], sums, first)
    grids = jnp.stack([*grids.values()], axis=1).reshape(c, stride, stride, rows, columns, images)
    x = grids.transpose(0, 3, 1, 4, 2, 5).reshape(c, rows * stride, columns * stride, images)
    return x[:, :h, :w]


def _relu_pool(y, bias):
    """As `pooling.relu_pool`, of 4 arrays or one."""
    if len(y) == 4:
        return pooling.relu_pool(*y, bias)
    y = y[0] + bias
    return jax.nn.relu(y), jnp.where(y > 0, jnp.uint8(0), jnp.uint8(1))


def _through_bits(function, x, *operands):
    """`function(bits, x, *operands)`, where `bits` makes of bfloat16 the integers it is stored as.

    To copy or cut bfloat16, XLA on CPU makes float32 of it, and bfloat16 of the result. Integers
    have no derivative: what is differentiated once more is the function of numbers.
    """
    of_numbers = partial(function, lambda x: x)
    if x.dtype != jnp.bfloat16:
        return of_numbers(x, *operands)
    of_bits = jax.custom_jvp(
        partial(function, partial(lax.bitcast_convert_type, new_dtype=jnp.uint16))
    )
    of_bits.defjvp(partial(jax.jvp, of_numbers))
    return of_bits(x, *operands)


def _numbers(bits, dtype):
    """What `bits` made integers, as numbers again."""
    return lax.bitcast_convert_type(bits, dtype) if bits.dtype == jnp.uint16 else bits
