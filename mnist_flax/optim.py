"""Optax optimisers with Keras's numbers, and learning-rate schedules by name."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mnist_flax.errors import unknown

OPTIMIZERS = ("adam", "rmsprop")
SCHEDULES = ("constant", "cosine", "one_cycle", "exponential")


class Elementwise(optax.GradientTransformation):
    """An optimiser that updates a number by its own gradient, value and state alone."""


def create_schedule(name: str, learning_rate: float, total_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
        name: `constant`; `cosine`, falling to 0 along half a cosine; `one_cycle`, rising from
            1/25 to the full rate over the first 30 % of the steps, then falling to 1/250,000
            (Smith & Topin, 2018, with cosine flanks); `exponential`, falling to 1/100. Of these,
            `cosine` is Keras's CosineDecay and `exponential` its ExponentialDecay.
        learning_rate: the highest learning rate.
        total_steps: steps of the whole run.

    Raises:
        UserError: there is no such schedule.
    """
    match name:
        case "constant":
            return optax.constant_schedule(learning_rate)
        case "cosine":
            return optax.cosine_decay_schedule(learning_rate, total_steps)
        case "one_cycle":
            return optax.cosine_onecycle_schedule(total_steps, learning_rate)
        case "exponential":
            return optax.exponential_decay(learning_rate, total_steps, 0.01)
    raise unknown("schedule", name, SCHEDULES)


def create(name: str, schedule: optax.Schedule) -> Elementwise:
    """Adam or RMSprop as `keras.optimizers` defines them.

    Keras's Adam has betas .9 and .999 and epsilon 1e-7. It adds epsilon before correcting the
    bias of the second moment ("epsilon hat" in Kingma & Ba, 2015), where Optax adds it after;
    `_scale_by_keras_adam` follows Keras. Keras's RMSprop has rho .9 and adds epsilon 1e-7
    inside the square root, as `optax.scale_by_rms` does.

    Raises:
        UserError: there is no such optimiser.
    """
    match name:
        case "adam":
            scale = _scale_by_keras_adam(b1=0.9, b2=0.999, eps=1e-7)
        case "rmsprop":
            scale = optax.scale_by_rms(decay=0.9, eps=1e-7, eps_in_sqrt=True)
        case _:
            raise unknown("optimizer", name, OPTIMIZERS)
    return Elementwise(*optax.chain(scale, optax.scale_by_learning_rate(schedule)))


def without_schedule(name: str) -> Elementwise:
    """The optimiser with learning rate 0, for its initial state, which no schedule changes."""
    return create(name, optax.constant_schedule(0.0))


def update(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    """The parameters after an update, and the optimiser's state."""
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _scale_by_keras_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    def init(params):
        zeros = optax.tree.zeros_like
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros(params), zeros(params))

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        rate = jnp.sqrt(1 - b2**count) / (1 - b1**count)

        def step(m, v):
            # Where JAX makes 64 bits the default, the rate has them.
            return rate.astype(m.dtype) * m / (jnp.sqrt(v) + eps)

        updates = jax.tree.map(step, mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
