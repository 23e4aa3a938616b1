"""Convolution and max-pooling with Linen's parameters and results, fast where they run.

On GPU and TPU a convolution is XLA's own (cuDNN on GPU). XLA's convolution is slow on CPU, and
many times slower again inside a loop such as `lax.scan`, so that there it is written as matrix
products, of which `cpu_conv.py` has the forms. `lax.platform_dependent` chooses when the program is
lowered, so one traced function serves every platform. What is sharded over explicit axes of a mesh
takes XLA's own everywhere, since the loops of the others have no rule for it.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from mnist_flax import conv_pair, cpu_conv, pooling, random_bits, shardings, tiles, xla_conv
from mnist_flax.errors import UserError

# In batches of at most so many, a dense kernel's gradient is a sum of outer products, which XLA
# fuses with the update.
_FEW_EXAMPLES = 8


class Conv(nn.Module):
    """2-D convolution with stride 1, bias and ReLU, optionally max-pooled.

    Parameters are named and shaped as `flax.linen.Conv`'s: `kernel` [KH, KW, C, features] and
    `bias` [features]. They start as Keras's do: Glorot-uniform kernel, zero bias.

    Attributes:
        features: number of output channels.
        kernel_size: (KH, KW).
        padding: "VALID" or "SAME".
        pool: whether a `pooling.max_pool` follows.
        dtype: computation dtype; parameters are always float32.
    """

    features: int
    kernel_size: tuple[int, int]
    padding: str = "VALID"
    pool: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, OH, OW, features], with `pool` [B, OH // 2, OW // 2, features].

        Raises:
            UserError: nothing is left of the image.
        """
        kernel_shape = (*self.kernel_size, x.shape[-1], self.features)
        # Also where JAX makes 64 bits the default.
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), kernel_shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return (conv_relu_pool if self.pool else conv_relu)(x, kernel, bias, self.padding)

    def weights(self) -> tuple[jax.Array, jax.Array]:
        """Kernel and bias in the computation's dtype, once there are parameters."""
        kernel, bias = (self.get_variable("params", name) for name in ("kernel", "bias"))
        return tuple(promote_dtype(kernel, bias, dtype=self.dtype))


class MaxPool(nn.Module):
    """`pooling.max_pool` as a module, so that summaries and interceptors see it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return pooling.max_pool(x)


class Dropout(nn.Module):
    """`flax.linen.Dropout` from 16 random bits an element: half the time of 32.

    Attributes:
        rate: the probability that an element becomes zero, rounded to a multiple of 1/65,536; the
            others are scaled by 1 / (1 - rate).
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x of any shape; with `train` it needs the key "dropout", without it x is returned."""
        if not train:
            return x
        dropped = round(self.rate * 2**16)
        if dropped == 2**16:
            return jnp.zeros_like(x)
        kept = random_bits.at_least(self.make_rng("dropout"), dropped, x.size).reshape(x.shape)
        # In float32 at least, as 4/3 in bfloat16 is 0.2 % too large.
        scaled = x.astype(tiles.sum_dtype(x)) * (2**16 / (2**16 - dropped))
        return jnp.where(kept, scaled.astype(x.dtype), 0)


class Concatenate(nn.Module):
    """Concatenation along the channels, as a module."""

    @nn.compact
    def __call__(self, inputs: list[jax.Array]) -> jax.Array:
        return jnp.concatenate(inputs, axis=-1)


class Flatten(nn.Module):
    """[B, H, W, C] to [B, H·W·C] in row-major order, as a module."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Not -1, which a batch of no images leaves open.
        return x.reshape(len(x), math.prod(x.shape[1:]))


def conv_output_size(
    size: tuple[int, int], kernel_size: tuple[int, int], padding: str
) -> tuple[int, int]:
    """Height and width of a stride-1 convolution's output.

    Raises:
        UserError: the kernel does not fit into the image.
        ValueError: padding is neither "VALID" nor "SAME".
    """
    if padding == "SAME":
        return size
    if padding != "VALID":
        raise ValueError(f'padding is {padding!r}: give "VALID" or "SAME"')
    out = tuple(n - k + 1 for n, k in zip(size, kernel_size, strict=True))
    if min(out) < 1:
        raise UserError(
            f"images are too small for this network: {size[0]}×{size[1]} pixels reach a "
            f"{kernel_size[0]}×{kernel_size[1]} convolution; use larger images."
        )
    return out


def conv_relu(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: str) -> jax.Array:
    """ReLU of a stride-1 convolution (cross-correlation) and bias.

    Args:
        x: [B, H, W, C].
        kernel: [KH, KW, C, F].
        bias: [F].
        padding: "VALID" or "SAME".

    Returns:
        [B, OH, OW, F] of the operands' dtype; sums are kept in float32 at least.

    Raises:
        UserError: the kernel does not fit into the image.
    """
    conv_output_size(x.shape[1:3], kernel.shape[:2], padding)
    on_cpu = partial(cpu_conv.conv_relu, padding=padding)
    return _by_platform(on_cpu, partial(_xla_conv_relu, padding=padding), x, kernel, bias)


def conv_relu_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: str) -> jax.Array:
    """`pooling.max_pool(conv_relu(x, kernel, bias, padding))`, without the larger array on CPU.

    Bias and ReLU come after the pool: both keep the order of the numbers, so that the values and
    gradients are the same, for a quarter of the work.

    Returns:
        [B, OH // 2, OW // 2, F] of the operands' dtype.

    Raises:
        UserError: the kernel does not fit into the image, or the pool into the output.
    """
    pooling.check(conv_output_size(x.shape[1:3], kernel.shape[:2], padding))
    on_cpu = partial(cpu_conv.conv_relu_pool, padding=padding)
    return _by_platform(on_cpu, partial(_xla_conv_relu_pool, padding=padding), x, kernel, bias)


def conv_relu_twice(x: jax.Array, first: Conv, second: Conv) -> jax.Array:
    """second(first(x)) of 'valid' convolutions that have parameters, in one loop on CPU.

    Returns:
        [B, OH, OW, F] of the second's dtype, with its pool [B, OH // 2, OW // 2, F].

    Raises:
        UserError: a kernel does not fit into the image, or the pool into the output.
    """
    weights = (*first.weights(), *second.weights())
    size = conv_output_size(x.shape[1:3], first.kernel_size, "VALID")
    size = conv_output_size(size, second.kernel_size, "VALID")
    if second.pool:
        pooling.check(size)
    x = x.astype(weights[0].dtype)
    on_cpu = partial(conv_pair.conv_relu_twice, pool=second.pool)
    return _by_platform(on_cpu, partial(_xla_conv_relu_twice, pool=second.pool), x, *weights)


def _by_platform(on_cpu: Callable, default: Callable, *operands: jax.Array) -> jax.Array:
    if shardings.explicit(*operands):
        return default(*operands)
    return lax.platform_dependent(*shardings.alike(*operands), cpu=on_cpu, default=default)


def _xla_conv_relu_twice(x, kernel1, bias1, kernel2, bias2, *, pool):
    x = _xla_conv_relu(x, kernel1, bias1, padding="VALID")
    return (_xla_conv_relu_pool if pool else _xla_conv_relu)(x, kernel2, bias2, padding="VALID")


def _xla_conv_relu(x, kernel, bias, *, padding):
    return _bias_relu(xla_conv.convolution(x, kernel, padding), bias)


def _xla_conv_relu_pool(x, kernel, bias, *, padding):
    if shardings.explicit(x, kernel, bias):
        return _bias_relu(pooling.max_pool(xla_conv.convolution(x, kernel, padding)), bias)
    return pooling.bias_relu_pool(xla_conv.convolution(x, kernel, padding), bias)


@jax.custom_vjp
def _bias_relu(x, bias):
    """ReLU of x [B, H, W, F] and bias, which needs for its gradient nothing but its result.

    With `nn.relu`, which asks what came into it, cuDNN could not make it with the convolution.
    """
    return nn.relu(x + bias)


def _bias_relu_fwd(x, bias):
    y = nn.relu(x + bias)
    return y, y


def _bias_relu_bwd(y, g):
    # XLA would make `y > 0` a question about what came into it.
    g = jnp.where(y == 0, 0, g)
    return g, g.sum((0, 1, 2))


_bias_relu.defvjp(_bias_relu_fwd, _bias_relu_bwd)


def dense_product(x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None) -> jax.Array:
    """`lax.dot_general` for `flax.linen.Dense`: x [..., K], kernel [K, F] to [..., F].

    Of x [B, K], without `precision`, the kernel's gradient is faster than JAX's own.
    """
    if x.ndim != 2 or precision is not None or shardings.explicit(x, kernel):
        return lax.dot_general(x, kernel, dimension_numbers, precision=precision)
    return _product(*shardings.alike(x, kernel))


@jax.custom_vjp
def _product(x, kernel):
    return x @ kernel


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
    """product(x, g), once there is dx, the last that reads the kernel.

    Unless what overwrites the kernel waits for that, XLA copies the kernel in every step.
    """
    return product(x, g + 0 * dx[:1, :1])


def _sum_of_outer_products(x, g):
    """x.T @ g, which XLA fuses with the optimiser's update of a large kernel."""
    wide = tiles.sum_dtype(x)
    rows = zip(x.astype(wide), g.astype(wide), strict=True)
    return sum(a[:, None] * b for a, b in rows).astype(x.dtype)


def _transposed_twice(x, g):
    """x.T @ g as (g.T @ x).T, since XLA on CPU computes the former at half the speed."""
    # The barriers keep XLA from rewriting the latter as the former.
    return lax.optimization_barrier(lax.optimization_barrier(g.T) @ x).T


_product.defvjp(_product_fwd, _product_bwd)
