"""Winograd's 2×2 outputs of a 3×3 kernel (Lavin & Gray, 2016) for narrow layers under a 2×2 pool.

The outputs of a tile are the four under one pool. The images of a block come last, as in
`side_by_side.py`, so that the transforms are sums of whole arrays, however few channels there are.

Pixels 2 apart lie on one of four grids, and a pixel of all tiles is a run of one grid, from that of
the first tile to that of the last. Where a row of tiles ends, the run goes on through a tile that
reaches into the next row; what comes of it is left out, and has no gradient. Of `larger` that is
every sixth tile, and cutting the others out would take longer.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mnist_flax import pooling, side_by_side, tiles

# Bᵀ, G and Aᵀ of Lavin & Gray, the last product with its other sign, so that no row of either, or
# column, has minus alone; for both dimensions at once their Kronecker squares.
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, 1]])
_INPUT, _KERNEL, _OUTPUT = (np.kron(matrix, matrix) for matrix in (_INPUT, _KERNEL, _OUTPUT))

# With fewer channels or features there are too few products to save.
_MIN_WIDTH = 8


def suits(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `conv_relu_pool` can make this convolution, and faster than other forms."""
    kh, kw, c, features = kernel.shape
    wide = x.dtype.itemsize >= 4 and min(c, features) >= _MIN_WIDTH
    return wide and (kh, kw) == (3, 3) and tiles.is_split(len(x))


def conv_relu_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """ReLU of a 'valid' convolution of x [B, H, W, C], 2×2 max-pooled."""
    return side_by_side.in_blocks(lambda x: _blocks(x, kernel, bias), x)


@jax.custom_vjp
def _blocks(x, kernel, bias):
    """The same of blocks [blocks, C, H, W, images]."""
    return _blocks_fwd(x, kernel, bias)[0]


def _blocks_fwd(x, kernel, bias):
    weights = lax.optimization_barrier(_transformed_kernel(kernel).swapaxes(1, 2))

    def forward(block):
        products = jnp.matmul(weights, _transformed_tiles(block))
        return pooling.relu_pool(*_sums(_OUTPUT, products), bias[:, None])

    y, choice = lax.map(forward, x)
    return _without_gaps(y, x), (x, kernel, bias, choice)


def _blocks_bwd(residuals, g):
    x, kernel, bias, choice = residuals
    weights = _transformed_kernel(kernel)

    def backward(totals, block):
        dweights, dbias = totals
        x, choice, g = block
        dy = [jnp.where(choice == place, g, 0) for place in range(4)]
        dproducts = _stacked(_sums(_OUTPUT.T, dy))
        own = jnp.matmul(_transformed_tiles(x), dproducts.swapaxes(1, 2))
        dtiles = jnp.matmul(weights, dproducts)
        # Flat, as XLA is slow with rows of few numbers.
        dweights += own.reshape(dweights.shape)
        dbias += jnp.where(choice < 4, g, 0).sum(1)
        return (dweights, dbias), _input_gradient(_sums(_INPUT.T, dtiles), x)

    start = (tiles.zero(weights).reshape(16, -1), tiles.zero(bias))
    g = _with_gaps(g, choice.shape[2])
    (dweights, dbias), dx = lax.scan(backward, start, (x, choice, g))
    dkernel = tiles.dot(jnp.asarray(_KERNEL.T, x.dtype), dweights).reshape(kernel.shape)
    return dx, dkernel, dbias


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _transformed_kernel(kernel):
    """[3, 3, C, F] to [16, C, F]."""
    weights = tiles.dot(jnp.asarray(_KERNEL, kernel.dtype), kernel.reshape(9, -1))
    return weights.reshape(16, *kernel.shape[2:])


def _grid(x):
    """Rows and columns of the grids of x [..., H, W, images]: one more than there are tiles."""
    return x.shape[-3] // 2, x.shape[-2] // 2


def _starts(x):
    """Of each of a tile's 16 pixels its grid, and where in it the run begins."""
    _, columns = _grid(x)
    for i, j in np.ndindex(4, 4):
        yield i % 2 * 2 + j % 2, (i // 2 * columns + j // 2) * x.shape[-1]


def _stacked(arrays):
    return tiles.concatenate([array[None] for array in arrays])


def _sums(matrix, arrays):
    """matrix, of 1, 0 and -1, times the arrays."""

    def total(numbers):
        first, *rest = (arrays[i] for i in np.flatnonzero(numbers))
        return sum(rest, first)

    return [total(row > 0) - total(row < 0) if (row < 0).any() else total(row) for row in matrix]


def _transformed_tiles(x):
    """The tiles of x [C, H, W, images], transformed: [16, C, length]."""
    c, _, _, images = x.shape
    rows, columns = _grid(x)
    phases = x[:, : 2 * rows, : 2 * columns].reshape(c, rows, 2, columns, 2, images)
    grids = _stacked(phases[:, :, i, :, j] for i, j in np.ndindex(2, 2))
    grids = grids.reshape(4, c, -1)
    length = ((rows - 1) * columns - 1) * images
    taps = [grids[grid, :, start : start + length] for grid, start in _starts(x)]
    return _stacked(_sums(_INPUT, taps))


def _input_gradient(dtaps, x):
    """The gradient of x [C, H, W, images] by those of the runs that are its tiles' pixels."""
    c, h, w, images = x.shape
    rows, columns = _grid(x)
    grids = [jnp.zeros_like(x, shape=(c, rows * columns * images))] * 4
    for (grid, start), dtap in zip(_starts(x), dtaps, strict=True):
        part = lax.dynamic_slice_in_dim(grids[grid], start, dtap.shape[1], 1)
        grids[grid] = lax.dynamic_update_slice_in_dim(grids[grid], part + dtap, start, 1)
    phases = jnp.stack(grids, axis=1).reshape(c, 2, 2, rows, columns, images)
    dx = phases.transpose(0, 3, 1, 4, 2, 5).reshape(c, 2 * rows, 2 * columns, images)
    return jnp.pad(dx, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))


def _without_gaps(y, x):
    """The runs [blocks, F, length] of results as [blocks, F, OH, OW, images]."""
    rows, columns = _grid(x)
    y = jnp.pad(y, ((0, 0), (0, 0), (0, x.shape[4])))
    return y.reshape(*y.shape[:2], rows - 1, columns, x.shape[4])[:, :, :, :-1]


def _with_gaps(g, length):
    """The transpose of `_without_gaps`."""
    g = jnp.pad(g, ((0, 0), (0, 0), (0, 0), (0, 1), (0, 0)))
    return g.reshape(*g.shape[:2], -1)[:, :, :length]
