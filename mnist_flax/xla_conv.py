"""XLA's own convolution, for GPU and TPU.

JAX makes of several convolutions, as of several seeds, a grouped one, and of their kernels'
gradients, for which cuDNN has a form, a grouped one with windows as large as the images. Within
`jax.vmap(..., axis_name=SEVERAL)` they stay one after the other, each as it is alone, and the axis
of `vmap` stays in front. Only first gradients, in reverse mode, can be taken there.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

SEVERAL = "several"

# With more of them, which JAX batches, the program would take long to compile.
_MOST = 64


def convolution(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
    """The stride-1 convolution (cross-correlation) of [B, H, W, C] with [KH, KW, C, F].

    Args:
        x, kernel: of one dtype.
        padding: "VALID" or "SAME".

    Returns:
        [B, OH, OW, F] of that dtype.
    """
    return (_one_of_several if _among_several() else _convolved)(padding, x, kernel)


def _among_several():
    try:
        lax.axis_size(SEVERAL)
    except NameError:
        return False
    return True


def _convolved(padding, x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_of_several(padding, x, kernel):
    return _one_by_one(partial(_convolved, padding))(x, kernel)


def _one_of_several_fwd(padding, x, kernel):
    return _one_of_several(padding, x, kernel), (x, kernel)


def _one_of_several_bwd(padding, operands, g):
    x, kernel = operands

    def input_gradient(kernel, g):
        return _transposed(lambda x: _convolved(padding, x, kernel), x, g)

    def kernel_gradient(x, g):
        return _transposed(lambda kernel: _convolved(padding, x, kernel), kernel, g)

    return _one_by_one(input_gradient)(kernel, g), _one_by_one(kernel_gradient)(x, g)


_one_of_several.defvjp(_one_of_several_fwd, _one_of_several_bwd)


def _one_by_one(product: Callable) -> Callable:
    """A product of two arrays, of which `vmap` over both makes as many."""
    called = custom_vmap(product)

    @called.def_vmap
    def batched(size, in_batched, a, b):
        if all(in_batched) and 0 < size <= _MOST:
            return jnp.stack([called(*operands) for operands in zip(a, b, strict=True)]), True
        axes = tuple(0 if each else None for each in in_batched)
        return jax.vmap(product, axes)(a, b), True

    return called


def _transposed(linear, like, g):
    """The gradient, for `g` of its result, of a linear function of an array of that shape."""
    return jax.linear_transpose(linear, jax.ShapeDtypeStruct(like.shape, like.dtype))(g)[0]
