"""The product of a dense layer, with a kernel gradient that is fast on CPU too."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mnist_flax import shardings

# In batches of at most so many, a dense kernel's gradient is a sum of outer products, which XLA
# fuses with the update.
_FEW_EXAMPLES = 8


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None) -> jax.Array:
    """`lax.dot_general` for `flax.linen.Dense`: x [..., K], kernel [K, F] to [..., F].

    Of x [B, K], without `precision`, the kernel's gradient is faster than JAX's own.
    `dimension_numbers` contract x's last axis with the kernel's first, as `Dense` gives them.
    """
    # Examples of a batch of symbolic size, as of `jax.export`, cannot be counted.
    plain = x.ndim != 2 or precision is not None or not isinstance(x.shape[0], int)
    if plain or shardings.on_explicit_mesh(x, kernel):
        return lax.dot_general(x, kernel, dimension_numbers, precision=precision)
    return _product(*shardings.match_varying(x, kernel))


@jax.custom_vjp
def _product(x, kernel):
    return _product_fwd(x, kernel)[0]


def _product_fwd(x, kernel):
    return x @ kernel, (x, kernel)


def _product_bwd(residuals, g):
    x, kernel = residuals
    dx = g @ kernel.T
    few = 0 < len(x) <= _FEW_EXAMPLES
    dkernel = lax.platform_dependent(
        x,
        g,
        dx,
        cpu=partial(_after, _sum_of_outer_products if few else _transposed_twice),
        default=lambda x, g, _: _sum_of_outer_products(x, g) if few else x.T @ g,
    )
    return dx, dkernel


def _after(product, x, g, dx):
    """product(x, g), made to wait for dx, the last to read the kernel.

    Without 0·dx XLA may update the kernel first, for which it copies it in every step.
    """
    return product(x, g + 0 * dx[:1, :1])


def _sum_of_outer_products(x, g):
    """x.T @ g, which XLA fuses with the optimiser's update of a large kernel."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows = zip(x.astype(wide), g.astype(wide), strict=True)
    return sum(a[:, None] * b for a, b in rows).astype(x.dtype)


def _transposed_twice(x, g):
    """x.T @ g as (g.T @ x).T, since XLA on CPU computes the former at half the speed."""
    # The barriers keep XLA from rewriting the latter as the former.
    return lax.optimization_barrier(lax.optimization_barrier(g.T) @ x).T


_product.defvjp(_product_fwd, _product_bwd)
