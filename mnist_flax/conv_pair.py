"""A narrow convolution and a wide one after it, block by block in one loop on CPU.

What lies between them is the largest array of a network, 86 kB an image of `double_conv_3x3`.
Each block of the wide one makes its own part of it, forwards and again for the gradient, which
takes less time than to write and read it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mnist_flax import cpu_conv, tiles, winograd

# Depth of the narrow one's product, up to which it is cheap enough to be made twice.
_MAX_DEPTH = 64


def conv_relu_twice(
    x: jax.Array,
    kernel1: jax.Array,
    bias1: jax.Array,
    kernel2: jax.Array,
    bias2: jax.Array,
    pool: bool,
) -> jax.Array:
    """ReLU of two 'valid' convolutions of x [B, H, W, C], the second 2×2 max-pooled with `pool`."""
    if _suits(x, kernel1, kernel2):
        return _in_one_loop(x, kernel1, bias1, kernel2, bias2, pool)
    x = cpu_conv.conv_relu(x, kernel1, bias1, "VALID")
    second = cpu_conv.conv_relu_pool if pool else cpu_conv.conv_relu
    return second(x, kernel2, bias2, "VALID")


def _suits(x, kernel1, kernel2):
    narrow = kernel1.size // kernel1.shape[3] <= _MAX_DEPTH and not winograd.suits(x, kernel1)
    return narrow and tiles.is_split(len(x)) and winograd.suits(x, kernel2)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _in_one_loop(x, kernel1, bias1, kernel2, bias2, pool):
    return _in_one_loop_fwd(x, kernel1, bias1, kernel2, bias2, pool)[0]


def _in_one_loop_fwd(x, kernel1, bias1, kernel2, bias2, pool):
    plan = _plan(x, kernel1, kernel2, pool)
    weights = winograd.transformed_kernel(kernel2, plan)

    def forward(block):
        between = cpu_conv.conv_relu_by_patches(block, kernel1, bias1)
        return winograd.forward(between, weights, bias2, plan)

    blocks, choice = lax.map(forward, plan.split(x))
    return tiles.join(blocks, len(x)), (x, kernel1, bias1, kernel2, bias2, choice)


def _in_one_loop_bwd(pool, residuals, g):
    x, kernel1, bias1, kernel2, bias2, choice = residuals
    plan = _plan(x, kernel1, kernel2, pool)
    weights = winograd.transformed_kernel(kernel2, plan)

    def backward(block):
        x, choice, g = block
        between = cpu_conv.conv_relu_by_patches(x, kernel1, bias1)
        dweights, dbias2, g = winograd.backward(between, choice, g, weights, plan)
        g = jnp.where(between > 0, g, 0)
        return (*cpu_conv.weight_gradients(x, kernel1, g), dweights, dbias2), g

    def add(totals, block):
        return jax.tree.map(jnp.add, totals, backward(block)[0]), None

    blocks = (plan.split(x), choice, plan.split(g))
    start = tuple(tiles.zero(a) for a in (kernel1, bias1, weights, bias2))
    (dkernel1, dbias1, dweights, dbias2), _ = lax.scan(add, start, blocks)
    dkernel2 = winograd.kernel_gradient(dweights, kernel2, plan)
    # A loop of its own, which XLA leaves out for a network's images.
    dx = lax.map(lambda block: cpu_conv.input_gradient(kernel1, backward(block)[1]), blocks)
    return tiles.join(dx, len(x)), dkernel1, dbias1, dkernel2, dbias2


_in_one_loop.defvjp(_in_one_loop_fwd, _in_one_loop_bwd)


def _plan(x, kernel1, kernel2, pool):
    kh, kw, _, features = kernel1.shape
    shape = (len(x), x.shape[1] - kh + 1, x.shape[2] - kw + 1, features)
    return winograd.plan_for(jax.ShapeDtypeStruct(shape, x.dtype), kernel2, pool)
