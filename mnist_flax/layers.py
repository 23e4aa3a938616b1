"""The layers of the networks, with Linen's parameters and results, fast where they run.

On GPU and TPU a convolution is XLA's own (`xla_conv.py`; cuDNN on GPU). XLA's is slow on CPU, and
many times slower again inside a loop such as `lax.scan`, so that there it is written as matrix
products, of which `cpu_conv.py` has the forms. `lax.platform_dependent` chooses when the program is
lowered, so one traced function serves every platform. What is sharded over explicit axes of a mesh
takes XLA's own everywhere, since the loops of the others have no rule for it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from mnist_flax import conv_pair, cpu_conv, pooling, random_bits, shardings, xla_conv
from mnist_flax.errors import UserError


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

    What is dropped of an example depends on the key and the example's place in the batch.

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
        kept = random_bits.at_least(self.make_rng("dropout"), dropped, x.shape)
        # In float32 at least, as 4/3 in bfloat16 is 0.2 % too large.
        scaled = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * (2**16 / (2**16 - dropped))
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
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))


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
            f"{kernel_size[0]}×{kernel_size[1]} convolution; use larger images"
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
        [B, OH, OW, F] of the operands' dtype. Sums are kept in float32 or wider; on GPU and TPU
        they are rounded to the operands' dtype before the bias is added.

    Raises:
        UserError: the kernel does not fit into the image.
    """
    conv_output_size(x.shape[1:3], kernel.shape[:2], padding)
    return _by_platform(
        x, kernel, bias, on_cpu=cpu_conv.conv_relu, default=xla_conv.conv_relu, padding=padding
    )


def conv_relu_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: str) -> jax.Array:
    """`pooling.max_pool(conv_relu(x, kernel, bias, padding))`.

    On CPU the pool mostly comes first, then bias and ReLU on a quarter of the numbers. Both keep
    the order of numbers, so that the values are equal. So are the gradients, except where adding
    the bias makes unequal numbers equal: then the largest of them gets it, not the first.

    Returns:
        [B, OH // 2, OW // 2, F] of the operands' dtype.

    Raises:
        UserError: the kernel does not fit into the image, or the pool into the output.
    """
    pooling.check(conv_output_size(x.shape[1:3], kernel.shape[:2], padding))
    return _by_platform(
        x,
        kernel,
        bias,
        on_cpu=cpu_conv.conv_relu_pool,
        default=xla_conv.conv_relu_pool,
        padding=padding,
    )


def conv_relu_twice(x: jax.Array, first: Conv, second: Conv) -> jax.Array:
    """second(first(x)) of two convolutions that have parameters, in one loop on CPU.

    Args:
        x: [B, H, W, C].
        first, second: of one dtype, with padding "VALID"; the first without a pool.

    Returns:
        [B, OH, OW, F] of their dtype, with the second's pool [B, OH // 2, OW // 2, F].

    Raises:
        UserError: a kernel does not fit into the image, or the pool into the output.
    """
    weights = (*first.weights(), *second.weights())
    size = conv_output_size(x.shape[1:3], first.kernel_size, "VALID")
    size = conv_output_size(size, second.kernel_size, "VALID")
    if second.pool:
        pooling.check(size)
    x = x.astype(weights[0].dtype)
    return _by_platform(
        x,
        *weights,
        on_cpu=conv_pair.conv_relu_twice,
        default=xla_conv.conv_relu_twice,
        pool=second.pool,
    )


# Jitted, as outside of any `jit` it would be compiled anew in every call; inside of one,
# `inline=True` leaves no call of its own.
@partial(jax.jit, static_argnames=("on_cpu", "default", "padding", "pool"), inline=True)
def _by_platform(
    *operands: jax.Array, on_cpu: Callable, default: Callable, **options: Any
) -> jax.Array:
    on_cpu, default = partial(on_cpu, **options), partial(default, **options)
    # A batch of symbolic size, as of `jax.export`, cannot be cut into blocks.
    if shardings.on_explicit_mesh(*operands) or not isinstance(operands[0].shape[0], int):
        return default(*operands)
    return lax.platform_dependent(*shardings.match_varying(*operands), cpu=on_cpu, default=default)
