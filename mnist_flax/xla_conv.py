"""Convolutions by XLA itself, for GPU and TPU.

Over several seeds `jax.vmap` would make one grouped convolution, and of the kernels' gradients one
with windows as large as the images, for which cuDNN does not use the algorithm that it has for a
single one. Within `jax.vmap(..., axis_name=SEED_AXIS)` each seed therefore keeps its own, up to
`_MAX_SEEDS`, and the axis of `vmap` stays in front. Only first gradients, in reverse mode, can be
taken there.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from mnist_flax import pooling, shardings

# With more of them, which JAX batches, the program would take long to compile.
_MAX_SEEDS = 64


def conv_relu(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: str) -> jax.Array:
    """As `layers.conv_relu`."""
    return _bias_relu(convolution(x, kernel, padding), bias)


def conv_relu_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: str) -> jax.Array:
    """As `layers.conv_relu_pool`."""
    if shardings.on_explicit_mesh(x, kernel, bias):
        return _bias_relu(pooling.max_pool(convolution(x, kernel, padding)), bias)
    return pooling.bias_relu_pool(convolution(x, kernel, padding), bias)


def conv_relu_twice(
    x: jax.Array,
    kernel1: jax.Array,
    bias1: jax.Array,
    kernel2: jax.Array,
    bias2: jax.Array,
    pool: bool,
) -> jax.Array:
    """As `layers.conv_relu_twice`, of the weights of both."""
    second = conv_relu_pool if pool else conv_relu
    return second(conv_relu(x, kernel1, bias1, "VALID"), kernel2, bias2, "VALID")


def convolution(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
    """The stride-1 convolution (cross-correlation) of [B, H, W, C] with [KH, KW, C, F].

    Args:
        x, kernel: of one dtype.
        padding: "VALID" or "SAME".

    Returns:
        [B, OH, OW, F] of that dtype.
    """
    return (_one_of_seeds if _among_seeds() else _convolved)(padding, x, kernel)


def _among_seeds():
    try:
        lax.axis_size(shardings.SEED_AXIS)
    except NameError:
        return False
    return True


def _convolved(padding, x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_of_seeds(padding, x, kernel):
    return _one_by_one(partial(_convolved, padding))(x, kernel)


def _one_of_seeds_fwd(padding, x, kernel):
    return _one_of_seeds(padding, x, kernel), (x, kernel)


def _one_of_seeds_bwd(padding, operands, g):
    x, kernel = operands

    def input_gradient(kernel, g):
        return _transposed(lambda x: _convolved(padding, x, kernel), x, g)

    def kernel_gradient(x, g):
        return _transposed(lambda kernel: _convolved(padding, x, kernel), kernel, g)

    return _one_by_one(input_gradient)(kernel, g), _one_by_one(kernel_gradient)(x, g)


_one_of_seeds.defvjp(_one_of_seeds_fwd, _one_of_seeds_bwd)


def _one_by_one(product: Callable) -> Callable:
    """A product of two arrays, of which `vmap` over both makes as many."""
    called = custom_vmap(product)

    @called.def_vmap
    def batched(size, in_batched, a, b):
        if all(in_batched) and 0 < size <= _MAX_SEEDS:
            return jnp.stack([called(*operands) for operands in zip(a, b, strict=True)]), True
        axes = tuple(0 if each else None for each in in_batched)
        return jax.vmap(product, axes)(a, b), True

    return called


def _transposed(linear, like, g):
    """The gradient, for `g` of its result, of a linear function of an array of that shape."""
    return jax.linear_transpose(linear, jax.ShapeDtypeStruct(like.shape, like.dtype))(g)[0]


@jax.custom_vjp
def _bias_relu(x, bias):
    """ReLU of x [B, H, W, F] and bias, which needs for its gradient nothing but its result.

    With `nn.relu`, which asks what came into it, cuDNN could not make it with the convolution.
    """
    return _bias_relu_fwd(x, bias)[0]


def _bias_relu_fwd(x, bias):
    y = nn.relu(x + bias)
    return y, y


def _bias_relu_bwd(y, g):
    # XLA would make `y > 0` a question about what came into it.
    g = jnp.where(y == 0, 0, g)
    return g, g.sum((0, 1, 2))


_bias_relu.defvjp(_bias_relu_fwd, _bias_relu_bwd)
