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

# Bytes of a block of the batch, transformed: a core's L2 cache.
_BLOCK_BYTES = 2 * 2**20


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
    plan = _plan(x, kernel, pool)
    weights = _transformed_kernel(kernel, plan)

    def forward(block):
        transformed = _transformed_tiles(block, plan)
        # Larger tiles take longer to transform again than to read.
        kept = transformed if plan.m > 2 else None
        products = jnp.matmul(transformed, weights)
        y = tiles.dot(plan.output, products.reshape(len(products), -1))
        y = y.reshape(plan.m // 2, 2, plan.m // 2, 2, -1, kernel.shape[3])
        if not pool:
            y = _from_output_tiles(y.reshape(plan.m, plan.m, *y.shape[4:]), plan)
            y = jax.nn.relu(y + bias)
            return y, y > 0, kept
        pooled, choice = pooling.relu_pool(*(y[:, i, :, j] for i in (0, 1) for j in (0, 1)), bias)
        return _from_output_tiles(pooled, plan), choice, kept

    blocks, choice, kept = lax.map(forward, plan.split(x))
    return tiles.join(blocks, len(x)), (x, kernel, bias, choice, kept)


def _conv_relu_bwd(pool, residuals, g):
    x, kernel, bias, choice, kept = residuals
    plan = _plan(x, kernel, pool)
    weights = _transformed_kernel(kernel, plan)
    m, features = plan.m, kernel.shape[3]

    def backward(totals, block):
        x, choice, kept, g = block
        if pool:
            g = _to_output_tiles(g, plan)
            dbias = jnp.where(choice < 4, g, 0).sum((0, 1, 2))
            places = [(i // 2, j // 2, i % 2 * 2 + j % 2) for i in range(m) for j in range(m)]
            dy = jnp.stack([jnp.where(choice[i, j] == place, g[i, j], 0) for i, j, place in places])
        else:
            g = jnp.where(choice, g, 0)
            dbias = g.sum((0, 1, 2))
            dy = _to_output_tiles(g, plan)
        dproducts = tiles.dot(plan.output.T, dy.reshape(m * m, -1))
        dproducts = dproducts.reshape(len(weights), -1, features)
        transformed = _transformed_tiles(x, plan) if kept is None else kept
        dweights = jnp.matmul(transformed.swapaxes(1, 2), dproducts)
        dtiles = jnp.matmul(dproducts, weights.swapaxes(1, 2))
        dtiles = tiles.dot(plan.input.T, dtiles.reshape(len(weights), -1))
        dtiles = dtiles.reshape(*plan.size, len(x), *plan.count, -1).transpose(2, 3, 4, 0, 1, 5)
        return (totals[0] + dweights, totals[1] + dbias), tiles.add(dtiles, m, *x.shape[1:3])

    start = (tiles.zero(weights), tiles.zero(bias))
    blocks = (plan.split(x), choice, kept, plan.split(g))
    (dweights, dbias), dx = lax.scan(backward, start, blocks)
    dkernel = tiles.dot(plan.kernel.T, dweights.reshape(len(weights), -1)).reshape(kernel.shape)
    return tiles.join(dx, len(x)), dkernel, dbias


conv_relu.defvjp(_conv_relu_fwd, _conv_relu_bwd)


class _Plan(NamedTuple):
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


def _plan(x, kernel, pool):
    kh, kw, c, features = kernel.shape
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
    q = m // stride
    numbers = math.prod(size) * math.prod(count) * 2 * (c + features)
    split = tiles.splitter(len(x), _BLOCK_BYTES // (numbers * x.dtype.itemsize))
    matrices = (matrix.astype(x.dtype) for matrix in _matrices(m, kh, kw))
    return _Plan(m, size, count, out, q, *matrices, split)


@cache
def _matrices(m, kh, kw):
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

    return tuple(np.kron(a, b) for a, b in zip(one(kh), one(kw), strict=True))


def _transformed_kernel(kernel, plan):
    """[KH, KW, C, F] to [n, C, F]."""
    kh, kw, c, features = kernel.shape
    return tiles.dot(plan.kernel, kernel.reshape(kh * kw, -1)).reshape(-1, c, features)


def _transformed_tiles(x, plan):
    """[B, H, W, C] to [n, B·TH·TW, C]."""
    h, w = (plan.m * t + n - plan.m for t, n in zip(plan.count, plan.size, strict=True))
    taps = jnp.stack(tiles.taps(tiles.fit(x, h, w), plan.size, plan.count, plan.m))
    return tiles.dot(plan.input, taps.reshape(len(taps), -1)).reshape(len(taps), -1, x.shape[3])


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
