"""Winograd's minimal filtering (Lavin & Gray, 2016): a wide convolution with fewer products.

Tiles of the input and the kernel are transformed so that m×m outputs take (m + KH - 1)·(m + KW - 1)
products instead of m²·KH·KW: 64 instead of 400 for 4×4 outputs of a 5×5 kernel, 16 instead of 36
for 2×2 of a 3×3. Tiles and outputs are transformed along one dimension after the other, as sums of
whole arrays: the matrix of both at once, which a kernel is multiplied with, would be up to five
times the arithmetic.

The price is accuracy, at 5×5 an error of about 1e-5 of the largest output, and that where an output
is exactly zero, as of a blank part of an image before the first update of the biases, rounding
decides whether ReLU passes the gradient to the bias.
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
_MAX_TILES = 128


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
        uint8 [q², B·TH·TW, F], which of the four, or 4 for none.
    """
    products = jnp.matmul(_transformed_tiles(x, plan), weights)
    outputs = _output_tiles(products, plan)
    if not plan.pool:
        y = _from_output_tiles(plan.concatenate(outputs), plan)
        y = jax.nn.relu(y + bias)
        return y, y > 0
    pools = (pooling.relu_pool(*(outputs[i] for i in pool), bias) for pool in plan.pools)
    y, choice = (plan.concatenate(parts) for parts in zip(*pools, strict=True))
    return _from_output_tiles(y, plan), choice


def backward(
    x: jax.Array, choice: jax.Array, g: jax.Array, weights: jax.Array, plan: "Plan"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of weights, bias and x by a block whose result has the gradient g.

    `choice` is of `forward`. The shapes are [n, C, F], [F] and [B, H, W, C].
    """
    if plan.pool:
        g = _to_output_tiles(g, plan)
        dbias = jnp.where(choice < 4, g, 0).sum((0, 1))
        places = jnp.arange(4, dtype=choice.dtype)[:, None, None]
        dy = jnp.where(choice[:, None] == places, g[:, None], 0)
        # A gather, which XLA does not fuse into all that reads it.
        dy = dy.reshape(-1, *g.shape[1:])[np.argsort(plan.pools.ravel())]
    else:
        g = jnp.where(choice, g, 0)
        dbias = g.sum((0, 1, 2))
        dy = _to_output_tiles(g, plan)
    dproducts = _products_gradient(dy.reshape(plan.m, plan.m, *dy.shape[1:]), plan)
    dweights = jnp.matmul(_transformed_tiles(x, plan).swapaxes(1, 2), dproducts)
    dtiles = jnp.matmul(dproducts, weights.swapaxes(1, 2))
    return dweights, dbias, _input_gradient(dtiles, x, plan)


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
        pools: the four outputs of a tile under each pool, in row-major order.
        output, input: the constant matrices, [m, N] and [N, N], of rows and of columns (Aᵀ and Bᵀ
            of Lavin & Gray, 2016).
        kernel: G, of both dimensions at once: [n, KH·KW] with n = NH·NW.
        split: cuts a batch into blocks.
        concatenate: puts a list of arrays together. To write in place is faster, but XLA gives what
            does so one thread, and a batch that is not split has them all.
    """

    pool: bool
    m: int
    size: tuple[int, int]
    count: tuple[int, int]
    out: tuple[int, int]
    q: int
    pools: np.ndarray
    output: tuple[np.ndarray, np.ndarray]
    input: tuple[np.ndarray, np.ndarray]
    kernel: np.ndarray
    split: Callable[[jax.Array], jax.Array]
    concatenate: Callable[..., jax.Array]


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

    # Larger tiles cost more to transform and round more: they must save a quarter of the products.
    m = 4 if tiling(4)[2] < 3 / 4 * tiling(2)[2] else 2
    size, count, _ = tiling(m)
    split = tiles.splitter(len(x), _MAX_TILES // math.prod(count))
    outputs, kernels, inputs = zip(*(_matrices(m, k) for k in (kh, kw)), strict=True)
    pools = np.arange(m * m).reshape(m // 2, 2, m // 2, 2).swapaxes(1, 2).reshape(-1, 4)
    both = np.kron(*kernels).astype(x.dtype)
    concatenate = tiles.concatenate if tiles.is_split(len(x)) else jnp.concatenate
    sizes = (m, size, count, out, m // stride)
    return Plan(pool, *sizes, pools, outputs, inputs, both, split, concatenate)


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

    inverse = np.linalg.inv(values(n))
    return values(m).T, values(k), np.where(np.abs(inverse) < 1e-9, 0, inverse).T


def transformed_kernel(kernel: jax.Array, plan: Plan) -> jax.Array:
    """[KH, KW, C, F] to the weights, [n, C, F]."""
    kh, kw, c, features = kernel.shape
    return tiles.dot(plan.kernel, kernel.reshape(kh * kw, -1)).reshape(-1, c, features)


def kernel_gradient(dweights: jax.Array, kernel: jax.Array, plan: Plan) -> jax.Array:
    """The kernel's gradient by that of the weights."""
    return tiles.dot(plan.kernel.T, dweights.reshape(len(dweights), -1)).reshape(kernel.shape)


def _transformed_tiles(x, plan):
    """[B, H, W, C] to [n, B·TH·TW, C]."""
    m, (nh, nw), (th, tw), c = plan.m, plan.size, plan.count, x.shape[3]
    rows, columns = _whole(th, nh, m), _whole(tw, nw, m)
    x = tiles.fit(x, m * rows, m * columns).reshape(len(x), m * rows, columns, m, c)
    taps = [x[:, :, j // m : j // m + tw, j % m] for j in range(nw)]
    x = plan.concatenate([_sum(row, taps)[None] for row in plan.input[1]])
    x = x.reshape(nw, -1, rows, m, tw * c)
    taps = [x[:, :, i // m : i // m + th, i % m] for i in range(nh)]
    return plan.concatenate([_sum(row, taps).reshape(nw, -1, c) for row in plan.input[0]])


def _input_gradient(dtiles, x, plan):
    """The transpose of `_transformed_tiles`."""
    m, (nh, nw), (th, tw), c = plan.m, plan.size, plan.count, x.shape[3]
    rows, columns = _whole(th, nh, m), _whole(tw, nw, m)
    dx = _overlapped(plan, plan.input[0], dtiles.reshape(nh, nw, len(x), th, tw * c), rows)
    dx = _overlapped(plan, plan.input[1], dx.reshape(nw, len(x), m * rows, tw, c), columns)
    return tiles.fit(dx.reshape(len(x), m * rows, m * columns, c), *x.shape[1:3])


def _overlapped(plan, matrix, dtiles, count):
    """matrix.T times tiles [N, A, B, T, D], added up to [A, B, count, m, D]."""

    def phase(first):
        """Pixels m apart, by one tile after the other that reaches them."""
        for shift, pixel in enumerate(range(first, len(matrix), plan.m)):
            after = count - dtiles.shape[3] - shift
            filling = ((0, 0), (0, 0), (shift, after), (0, 0))
            yield jnp.pad(_sum(matrix[:, pixel], dtiles), filling)[:, :, :, None]

    return plan.concatenate([sum(phase(i)) for i in range(plan.m)], 3)


def _output_tiles(products, plan):
    """[n, B·TH·TW, F] to the m² outputs of all tiles, [1, B·TH·TW, F] each."""
    products = products.reshape(*plan.size, *products.shape[1:])
    rows = plan.concatenate([_sum(row, products)[None] for row in plan.output[0]])
    return [_sum(column, row)[None] for row in rows for column in plan.output[1]]


def _products_gradient(dy, plan):
    """The transpose of `_output_tiles`, of [m, m, B·TH·TW, F]."""
    dy = dy.swapaxes(0, 1)
    rows = plan.concatenate([_sum(column, dy)[None] for column in plan.output[1].T])
    rows = rows.swapaxes(0, 1)
    return plan.concatenate([_sum(row, rows) for row in plan.output[0].T])


def _sum(numbers, arrays):
    """The sum of number·array, without what is 0."""
    first, *rest = (float(numbers[i]) * arrays[i] for i in np.flatnonzero(numbers))
    return sum(rest, first)


def _whole(count, size, m):
    """A side of the image in steps of m, so that there are `count` tiles of `size`."""
    return count - 1 + -(-size // m)


def _from_output_tiles(y, plan):
    """[q², B·TH·TW, F] to [B, OH, OW, F]."""
    q, (th, tw) = plan.q, plan.count
    y = y.reshape(q, q, -1, th, tw, y.shape[-1]).transpose(2, 3, 0, 4, 1, 5)
    return tiles.fit(y.reshape(-1, th * q, tw * q, y.shape[-1]), *plan.out)


def _to_output_tiles(y, plan):
    """The transpose of `_from_output_tiles`."""
    q, (th, tw) = plan.q, plan.count
    y = tiles.fit(y, th * q, tw * q).reshape(-1, th, q, tw, q, y.shape[3])
    parts = [y[:, :, i, :, j].reshape(1, -1, y.shape[5]) for i, j in np.ndindex(q, q)]
    return plan.concatenate(parts)
