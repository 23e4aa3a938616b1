"""Winograd's minimal filtering (Lavin & Gray, 2016): a wide convolution with fewer products.

Tiles of the input and the kernel are transformed so that m×m outputs take (m + KH - 1)·(m + KW - 1)
products instead of m²·KH·KW: 64 instead of 400 for 4×4 outputs of a 5×5 kernel, 16 instead of 36
for 2×2 of a 3×3. The price is accuracy, at 5×5 an error of about 1e-5 of the largest output, and
that where an output is exactly zero, as of a blank part of an image before the first update of the
biases, rounding decides whether ReLU passes the gradient to the bias.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mnist_flax import pooling, tiles

# Tiles of a block of the batch: fewer give products too few rows, more leave the cache.
_MOST_TILES = 128


def suits(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `conv_relu` can make this convolution, and faster than other forms."""
    # In 16 bits the transforms lose too much; narrow layers have too few products to save.
    *size, c, features = kernel.shape
    wide = min(c, features) >= 32
    return x.dtype.itemsize >= 4 and wide and min(size) >= 3 and max(size) <= 5


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def conv_relu(x: jax.Array, kernel: jax.Array, bias: jax.Array, pool: bool) -> jax.Array:
    """ReLU of a 'valid' convolution of x [B, H, W, C], 2×2 max-pooled with `pool`."""
    return _conv_relu_fwd(x, kernel, bias, pool)[0]


def _conv_relu_fwd(x, kernel, bias, pool):
    plan = plan_for(x, kernel, pool)
    weights = transformed_kernel(kernel, plan)
    blocks, choice = lax.map(lambda x: forward(x, weights, bias, plan), plan.split(x))
    # Not the transformed tiles: on CPU they take longer to write and read than to make again.
    return tiles.join(blocks, len(x)), (x, kernel, bias, choice)


def _conv_relu_bwd(pool, residuals, g):
    x, kernel, bias, choice = residuals
    plan = plan_for(x, kernel, pool)
    weights = transformed_kernel(kernel, plan)

    def add(totals, block):
        dweights, dbias, dx = backward(*block, weights, plan)
        return (totals[0] + dweights, totals[1] + dbias), dx

    start = (tiles.zero(weights), tiles.zero(bias))
    blocks = (plan.split(x), choice, plan.split(g))
    (dweights, dbias), dx = lax.scan(add, start, blocks)
    return tiles.join(dx, len(x)), kernel_gradient(dweights, kernel, plan), dbias


def forward(
    x: jax.Array, weights: jax.Array, bias: jax.Array, plan: "Plan"
) -> tuple[jax.Array, jax.Array]:
    """The result for a block of images.

    Args:
        x: [B, H, W, C].
        weights: of `transformed_kernel`, [n, C, F].
        bias: [F].
        plan: of `plan_for`, of these images and kernel.

    Returns:
        y [B, OH, OW, F], and which numbers get the gradient: bool of y's shape; with `pool`
        uint8 [q, q, B·TH·TW, F], which of the four, or 4 for none.
    """
    products = jnp.matmul(_transformed_tiles(x, plan), weights)
    y = tiles.dot(plan.output, products.reshape(len(products), -1))
    if not plan.pool:
        y = _from_output_tiles(y.reshape(plan.q, plan.q, -1, len(bias)), plan)
        y = jax.nn.relu(y + bias)
        return y, y > 0
    y = y.reshape(plan.q, plan.q, 4, -1, len(bias))
    pooled, choice = pooling.relu_pool(*(y[:, :, i] for i in range(4)), bias)
    return _from_output_tiles(pooled, plan), choice


def backward(
    x: jax.Array, choice: jax.Array, g: jax.Array, weights: jax.Array, plan: "Plan"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of weights, bias and x by a block whose result has the gradient g.

    `choice` is of `forward`. The shapes are [n, C, F], [F] and [B, H, W, C].
    """
    m, features = plan.m, weights.shape[2]
    if plan.pool:
        g = _to_output_tiles(g, plan)
        dbias = jnp.where(choice < 4, g, 0).sum((0, 1, 2))
        if plan.q == 1:
            # XLA would fuse a stack of four, and branch for each of its numbers.
            dy = jnp.where(choice == jnp.arange(4, dtype=choice.dtype)[:, None, None], g, 0)
        else:
            places = [(p, i) for p in np.ndindex(plan.q, plan.q) for i in range(4)]
            dy = jnp.stack([jnp.where(choice[p] == i, g[p], 0) for p, i in places])
    else:
        g = jnp.where(choice, g, 0)
        dbias = g.sum((0, 1, 2))
        dy = _to_output_tiles(g, plan)
    dproducts = tiles.dot(plan.output.T, dy.reshape(m * m, -1))
    dproducts = dproducts.reshape(len(weights), -1, features)
    dweights = jnp.matmul(_transformed_tiles(x, plan).swapaxes(1, 2), dproducts)
    dtiles = jnp.matmul(dproducts, weights.swapaxes(1, 2))
    dtiles = tiles.dot(plan.input.T, dtiles.reshape(len(weights), -1))
    dtiles = dtiles.reshape(*plan.size, len(x), *plan.count, -1).transpose(2, 3, 4, 0, 1, 5)
    return dweights, dbias, tiles.add(dtiles, m, *x.shape[1:3])


conv_relu.defvjp(_conv_relu_fwd, _conv_relu_bwd)


class Plan(NamedTuple):
    """How a convolution is cut into tiles.

    Attributes:
        pool: whether a 2×2 max-pool follows.
        m: outputs of a tile are m×m.
        size: (NH, NW) of a tile.
        count: (TH, TW), tiles of an image.
        out: (OH, OW) of the result.
        q: a tile gives q×q numbers of the result: m, or half of it after a pool.
        output, kernel, input: the constant matrices, [m², n], [n, KH·KW], [n, n] with n = NH·NW
            (Aᵀ, G and Bᵀ of Lavin & Gray, 2016, for both dimensions at once). Where a pool follows,
            the rows of `output` are in an order in which the four under it follow each other.
        rows, columns: the same as `input`, of a whole side of the image: [NH·TH, H], [NW·TW, W].
        split: cuts a batch into blocks.
    """

    pool: bool
    m: int
    size: tuple[int, int]
    count: tuple[int, int]
    out: tuple[int, int]
    q: int
    output: np.ndarray
    kernel: np.ndarray
    input: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    split: Callable[[jax.Array], jax.Array]


def plan_for(x: jax.Array, kernel: jax.Array, pool: bool) -> Plan:
    """How to cut x, which may be abstract."""
    kh, kw = kernel.shape[:2]
    h, w = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    out, stride = ((h // 2, w // 2), 2) if pool else ((h, w), 1)

    def tiling(m):
        """Size of a tile, tiles of an image, products of an image by channels and features."""
        size = (m + kh - 1, m + kw - 1)
        count = tuple(-(-n * stride // m) for n in out)
        return size, count, math.prod(size) * math.prod(count)

    # Larger tiles cost more to transform: they must save a quarter of the products.
    m = 4 if tiling(4)[2] < 3 / 4 * tiling(2)[2] else 2
    size, count, _ = tiling(m)
    split = tiles.splitter(len(x), _MOST_TILES // math.prod(count))
    sides = [_matrices(m, k) for k in (kh, kw)]
    rows, columns = (_bands(side[2], t, m) for side, t in zip(sides, count, strict=True))
    output, *others = (np.kron(a, b) for a, b in zip(*sides, strict=True))
    if pool:
        output = output.reshape(m // 2, 2, m // 2, 2, -1).swapaxes(1, 2).reshape(m * m, -1)
    matrices = (matrix.astype(x.dtype) for matrix in (output, *others, rows, columns))
    return Plan(pool, m, size, count, out, m // stride, *matrices, split)


@cache
def _matrices(m, k):
    """Output, kernel and input matrices for m outputs of a kernel of size k, in one dimension.

    By Cook and Toom: polynomials are multiplied as their values at as many points as the product
    has coefficients, the last of them infinity. A convolution is the transpose of that.
    """
    n = m + k - 1

    def values(count):
        powers = np.vander([0, 1, -1, 2, -2, 1 / 2, -1 / 2][: n - 1], count, increasing=True)
        return np.vstack([powers, np.eye(count)[-1]])

    return values(m).T, values(k), np.linalg.inv(values(n)).T


def _bands(matrix, count, stride):
    """The matrix [N, N], times tiles that lie so far apart, as one of [N·count, side]."""
    n = len(matrix)
    bands = np.zeros((n, count, n + stride * (count - 1)))
    for t in range(count):
        bands[:, t, stride * t : stride * t + n] = matrix
    return bands.reshape(n * count, -1)


def transformed_kernel(kernel: jax.Array, plan: Plan) -> jax.Array:
    """[KH, KW, C, F] to the weights, [n, C, F]."""
    kh, kw, c, features = kernel.shape
    return tiles.dot(plan.kernel, kernel.reshape(kh * kw, -1)).reshape(-1, c, features)


def kernel_gradient(dweights: jax.Array, kernel: jax.Array, plan: Plan) -> jax.Array:
    """The kernel's gradient by that of the weights."""
    return tiles.dot(plan.kernel.T, dweights.reshape(len(dweights), -1)).reshape(kernel.shape)


def _transformed_tiles(x, plan):
    """[B, H, W, C] to [n, B·TH·TW, C]."""
    # All tiles of a row, then all of a column: none is cut out, and on images of this size that
    # takes about as much arithmetic as the matrix of a whole tile, or less.
    (nh, nw), (th, tw), c = plan.size, plan.count, x.shape[3]
    h, w = plan.rows.shape[1], plan.columns.shape[1]
    x = _times(plan.columns, tiles.fit(x, h, w).reshape(-1, w, c))
    x = _times(plan.rows, x.reshape(-1, h, nw * tw * c))
    x = x.reshape(-1, nh, th, nw, tw * c).transpose(1, 3, 0, 2, 4)
    return x.reshape(nh * nw, -1, c)


def _times(matrix, x):
    """matrix @ x for x [N, K, M]."""
    # Given the matrix alone, `matmul` would make [M', N, M] and transpose it.
    return jnp.matmul(jnp.broadcast_to(matrix, (len(x), *matrix.shape)), x)


def _from_output_tiles(y, plan):
    """[q, q, B·TH·TW, F] to [B, OH, OW, F]."""
    q, (th, tw) = plan.q, plan.count
    y = y.reshape(q, q, -1, th, tw, y.shape[-1]).transpose(2, 3, 0, 4, 1, 5)
    return tiles.fit(y.reshape(-1, th * q, tw * q, y.shape[-1]), *plan.out)


def _to_output_tiles(y, plan):
    """The transpose of `_from_output_tiles`."""
    q, (th, tw) = plan.q, plan.count
    y = tiles.fit(y, th * q, tw * q).reshape(-1, th, q, tw, q, y.shape[3])
    return y.transpose(2, 4, 0, 1, 3, 5).reshape(q, q, -1, y.shape[-1])
