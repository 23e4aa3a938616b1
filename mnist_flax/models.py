"""The networks of five Keras MNIST tutorials.

    model = models.create("larger")
    variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    logits = model.apply(variables, images)

Every network takes images [B, H, W, C] in [0, 1] of any floating-point dtype, which is cast, and
gives logits [B, num_classes], float32 or wider; integers (`steps.scale` scales uint8) raise
`UserError`. `train=True` turns dropout on and needs `rngs={"dropout": key}` where there is any.
Weights start as in Keras: Glorot-uniform kernels and zero biases. Any number of channels and
classes will do, and any image size of which the convolutions and pools leave something; smaller
images raise `UserError`. Gradients can be differentiated again. `jax.jvp` and `jax.jacfwd` of a
network fail, as JAX has no forward mode through `custom_vjp`; `jax.jacrev(jax.grad(f))` gives a
Hessian.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from mnist_flax.dense import dot_general
from mnist_flax.errors import UserError, unknown
from mnist_flax.layers import (
    Concatenate,
    Conv,
    Dropout,
    Flatten,
    MaxPool,
    conv_relu_twice,
)

Dense = partial(nn.Dense, kernel_init=nn.initializers.glorot_uniform(), dot_general=dot_general)


class CNN(nn.Module):
    """A stack of convolutions, then a stack of dense layers.

    Attributes:
        convs: (features, kernel size, whether a 2×2 max-pool follows) of each convolution.
        dense: features of each hidden dense layer.
        conv_dropout: dropout rate after the convolutions.
        dense_dropout: dropout rate after the hidden dense layers.
        num_classes: number of logits.
        dtype: computation dtype; parameters are float32, and logits are at least.
    """

    convs: tuple[tuple[int, int, bool], ...]
    dense: tuple[int, ...]
    conv_dropout: float = 0.0
    dense_dropout: float = 0.0
    num_classes: int = 10
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        _check(x)
        convs = [
            Conv(features, (kernel, kernel), pool=pool, dtype=self.dtype)
            for features, kernel, pool in self.convs
        ]
        # In one loop the two modules are not called, only their parameters are read: not where
        # there are none yet, nor where each call may be looked at, as by summaries, interceptors
        # or who collects intermediates.
        looked_at = (
            self.is_initializing()
            or self.is_mutable_collection("intermediates")
            or _is_intercepted()
        )
        if train and not looked_at and len(convs) > 1 and not convs[0].pool:
            first, second, *convs = convs
            x = conv_relu_twice(x, first, second)
        for conv in convs:
            x = conv(x)
        if self.conv_dropout:
            x = Dropout(self.conv_dropout)(x, train)
        x = Flatten()(x)
        for features in self.dense:
            x = nn.relu(Dense(features, dtype=self.dtype)(x))
        if self.dense_dropout:
            x = Dropout(self.dense_dropout)(x, train)
        return _logits(x, self.num_classes, self.dtype)


class Branched(nn.Module):
    """Two parallel convolutional branches, joined before three dense layers.

    Attributes:
        num_classes: number of logits.
        dtype: computation dtype; parameters are float32, and logits are at least.
    """

    num_classes: int = 10
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        _check(x)
        same_conv = partial(Conv, kernel_size=(3, 3), padding="SAME", dtype=self.dtype)
        trunk = same_conv(32, pool=True)(x)
        branches = []
        for _ in range(2):
            x = same_conv(64, pool=True)(trunk)
            branches.append(same_conv(256)(x))
        x = Flatten()(MaxPool()(Concatenate()(branches)))
        for features in (1000, 500):
            x = nn.relu(Dense(features, dtype=self.dtype)(x))
        return _logits(x, self.num_classes, self.dtype)


def _is_intercepted():
    # Flax has no public way to ask.
    return bool(getattr(nn.module, "_global_interceptor_stack", ()))


def _check(images):
    if images.ndim != 4:
        raise UserError(
            f"images are [B, H, W, C], and here is {images.shape}: add the axis of a batch or of "
            "channels, such as images[..., None]"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"images are floating-point numbers in [0, 1], and here are {images.dtype}: "
            "scale them, bytes as mnist_flax.steps.scale does"
        )


def _logits(x, num_classes, dtype):
    # Of bfloat16 ones the largest two would be equal where they differ by less than 1/256.
    return Dense(num_classes, dtype=jnp.promote_types(dtype, jnp.float32))(x)


_dropout_cnn = partial(CNN, dense=(128,), conv_dropout=0.25, dense_dropout=0.5)

_NETWORKS = {
    "larger": partial(CNN, convs=((30, 5, True), (15, 3, True)), dense=(128, 50), conv_dropout=0.2),
    "baseline": partial(CNN, convs=((32, 5, True),), dense=(128,), conv_dropout=0.2),
    "convnet": partial(CNN, convs=((32, 3, True), (64, 3, True), (64, 3, False)), dense=(64,)),
    "single_conv_5x5": partial(_dropout_cnn, convs=((32, 5, True),)),
    "double_conv_3x3": partial(_dropout_cnn, convs=((32, 3, False), (64, 3, True))),
    "double_conv_5x5": partial(_dropout_cnn, convs=((32, 5, False), (64, 5, True))),
    "branched": Branched,
}


def names() -> list[str]:
    """The networks that `create` knows."""
    return list(_NETWORKS)


def create(name: str, **overrides) -> nn.Module:
    """The network of that name, with its attributes (`num_classes`, `dtype`, ...) overridden.

    Raises:
        UserError: there is no such network.
    """
    if name not in _NETWORKS:
        raise unknown("network", name, _NETWORKS)
    return _NETWORKS[name](**overrides)
