"""XLA's own convolution, for GPU and TPU.

JAX makes of several convolutions, as of several seeds, a grouped one, and of their kernels'
gradients a grouped one whose windows are as large as the images, of which cuDNN has no fast form.
Here `vmap` leaves them one after the other, each in the form that cuDNN has for it, and the arrays
between them with the axis of seeds in front.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from mnist_flax import shardings

# So many are one after the other; more, such as the gradients of single examples, JAX batches.
_MOST = 64


class _Form(NamedTuple):
    padding: str
    kernel_size: tuple[int, int]


def convolution(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
    """The stride-1 convolution (cross-correlation) of [B, H, W, C] with [KH, KW, C, F].

    Args:
        x, kernel: of one dtype.
        padding: "VALID" or "SAME".

    Returns:
        [B, OH, OW, F] of that dtype.
    """
    # `custom_vmap` forgets how operands lie on a mesh.
    on_mesh = shardings.explicit(x, kernel) or shardings.varying(x, kernel)
    return (_convolved if on_mesh else _output)(_Form(padding, kernel.shape[:2]), x, kernel)


# As a convolution is linear in both operands, each of these three has the others as gradients.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _output(form, x, kernel):
    return _one_by_one(partial(_convolved, form))(x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _input_gradient(form, g, kernel):
    def product(g, kernel):
        b, *size, _ = g.shape
        if form.padding == "VALID":
            size = [n + k - 1 for n, k in zip(size, form.kernel_size, strict=True)]
        x = jax.ShapeDtypeStruct((b, *size, kernel.shape[2]), g.dtype)
        return jax.linear_transpose(lambda x: _convolved(form, x, kernel), x)(g)[0]

    return _one_by_one(product)(g, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_gradient(form, x, g):
    def product(x, g):
        kernel = jax.ShapeDtypeStruct((*form.kernel_size, x.shape[3], g.shape[3]), g.dtype)
        return jax.linear_transpose(lambda kernel: _convolved(form, x, kernel), kernel)(g)[0]

    return _one_by_one(product)(x, g)


def _kept(function):
    return lambda form, a, b: (function(form, a, b), (a, b))


def _output_bwd(form, operands, g):
    x, kernel = operands
    return _input_gradient(form, g, kernel), _kernel_gradient(form, x, g)


def _input_gradient_bwd(form, operands, x):
    g, kernel = operands
    return _output(form, x, kernel), _kernel_gradient(form, x, g)


def _kernel_gradient_bwd(form, operands, kernel):
    x, g = operands
    return _input_gradient(form, g, kernel), _output(form, x, kernel)


_output.defvjp(_kept(_output), _output_bwd)
_input_gradient.defvjp(_kept(_input_gradient), _input_gradient_bwd)
_kernel_gradient.defvjp(_kept(_kernel_gradient), _kernel_gradient_bwd)


def _convolved(form, x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), form.padding, dimension_numbers=numbers)


def _one_by_one(product: Callable) -> Callable:
    """A product of two arrays, of which `vmap` over both makes as many."""
    called = custom_vmap(product)

    @called.def_vmap
    def batched(size, in_batched, a, b):
        if all(in_batched) and size <= _MOST:
            return jnp.stack([called(*operands) for operands in zip(a, b, strict=True)]), True
        axes = tuple(0 if each else None for each in in_batched)
        return jax.vmap(product, axes)(a, b), True

    return called
