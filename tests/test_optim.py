from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnist_flax import optim

# From large to far below epsilon, where the placement of epsilon decides.
GRADIENTS = np.array([[1.0, -1e-3, 1e-7, 0.0], [0.5, 1e-3, -3e-8, 1e-9], [-2.0, 0.1, 1e-8, 0.0]])


def trajectory(name, learning_rate=1e-3):
    tx = optim.create(name, optax.constant_schedule(learning_rate))
    params = jnp.ones(4)
    state = tx.init(params)
    values = []
    for gradient in GRADIENTS:
        updates, state = tx.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        values.append(params)
    return np.stack(values)


def test_adam_is_keras_adam():
    m, v, w, expected = np.zeros(4), np.zeros(4), np.ones(4), []
    for t, g in enumerate(GRADIENTS, start=1):
        m += (g - m) * (1 - 0.9)
        v += (g**2 - v) * (1 - 0.999)
        alpha = 1e-3 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        w = w - alpha * m / (np.sqrt(v) + 1e-7)
        expected.append(w)
    np.testing.assert_allclose(trajectory("adam"), expected, rtol=2e-7)


def test_rmsprop_is_keras_rmsprop():
    v, w, expected = np.zeros(4), np.ones(4), []
    for g in GRADIENTS:
        v = 0.9 * v + 0.1 * g**2
        w = w - 1e-3 * g / np.sqrt(v + 1e-7)
        expected.append(w)
    np.testing.assert_allclose(trajectory("rmsprop"), expected, rtol=2e-7)


@pytest.mark.parametrize(
    ("name", "start", "middle", "end"),
    [
        ("constant", 1, 1, 1),
        ("cosine", 1, 0.5, 0),
        ("exponential", 1, 0.1, 0.01),
        # The cosine from 1 to 1/250,000 between steps 30 and 100, at step 50.
        ("one_cycle", 1 / 25, (1 + np.cos(np.pi * 20 / 70)) / 2, 1 / 250_000),
    ],
)
def test_schedules(name, start, middle, end):
    schedule = optim.create_schedule(name, 0.2, 100)
    values = [schedule(step) for step in (0, 50, 100)]
    np.testing.assert_allclose(values, 0.2 * np.array([start, middle, end]), rtol=1e-5, atol=1e-7)


def test_one_cycle_peaks_after_three_tenths():
    assert optim.create_schedule("one_cycle", 0.2, 100)(30) == pytest.approx(0.2)


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedules_of_very_short_runs_are_finite(name, steps):
    schedule = optim.create_schedule(name, 0.2, steps)
    assert all(0 <= schedule(step) <= 0.2 + 1e-6 for step in range(steps + 1))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_an_update_has_32_bits_where_64_are_the_default(name):
    tx, params = optim.create(name, optax.constant_schedule(1e-3)), jnp.ones(3)
    with jax.enable_x64(True):
        program = jax.make_jaxpr(partial(optim.update, tx))(params, tx.init(params), params)
    assert "f32[3]" in str(program) and "f64[3]" not in str(program)
