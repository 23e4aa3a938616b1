"""What a training run carries from step to step."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnist_flax import share_keys

# Not JAX's default, which may be set (`jax_default_prng_impl`): with some other generators
# `jax.vmap` draws every seed's numbers from the first seed's key, and a device cannot draw its
# share of a batch's numbers by itself.
_PRNG = share_keys.THREEFRY


@flax.struct.dataclass
class TrainState:
    """A pytree of arrays; the step functions take one and return the next.

    The states of several seeds are one state with a leading axis on every array.

    Attributes:
        step: int32 scalar, the number of updates made.
        params: the network's parameters, float32.
        opt_state: the optimiser's state.
        batch_stats: running statistics of BatchNorm layers; empty where there are none.
        key: uint32 [2], the Threefry key from which each step's is folded (`step_key`); it never
            changes.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    batch_stats: Any
    key: jax.Array


def create(
    seed: int, model: nn.Module, tx: optax.GradientTransformation, image_shape: tuple[int, int, int]
) -> TrainState:
    """The state before the first step, determined by the seed.

    Args:
        seed: any non-negative integer below 2**32.
        model: the network.
        tx: the optimiser.
        image_shape: (H, W, C) of the images.

    Raises:
        UserError: the images are too small for the network.
    """
    init_key, key = jax.random.split(root_key(seed))
    variables = model.init(init_key, jnp.zeros((1, *image_shape)), train=False)
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=variables["params"],
        opt_state=tx.init(variables["params"]),
        batch_stats=variables.get("batch_stats", {}),
        key=jax.random.key_data(key),
    )


def root_key(seed: int) -> jax.Array:
    """The key from which all randomness of a run derives, except the order of examples."""
    return jax.random.key(seed, impl=_PRNG)


def step_key(state: TrainState) -> jax.Array:
    """The key of the state's next step."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=_PRNG), state.step)


def num_updates(state: TrainState) -> int:
    """The number of updates made; that of each seed where the state is of several."""
    return int(np.ravel(state.step)[0])


def variables(state: TrainState) -> dict[str, Any]:
    """What the network's `apply` takes."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def count_parameters(params: Any) -> int:
    """The number of trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def num_bytes(tree: Any) -> int:
    """The bytes of all its arrays, which may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
