"""The same networks, trained the same way, as in the installed Keras."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from mnist_flax import datasets, models, optim, steps
from tests.helpers import integers, random_state, random_variables, uniform

keras = pytest.importorskip("keras", minversion="3", reason="Keras 3 is not installed")

from tests import keras_networks  # noqa: E402

RECIPES = {
    "branched": "adam",
    "convnet": "rmsprop",
    "double_conv_3x3": "adam",
    "double_conv_5x5": "adam",
    "single_conv_5x5": "adam",
    "baseline": "adam",
    "larger": "adam",
}
KERAS_OPTIMIZERS = {"adam": keras.optimizers.Adam, "rmsprop": keras.optimizers.RMSprop}


@pytest.mark.parametrize("name", models.names())
def test_logits_are_those_of_keras(name):
    theirs = keras_networks.create(name, activation=None)
    model = models.create(name)
    params = random_variables(model)["params"]
    keras_networks.set_params(theirs, params)
    # As many as are computed in blocks.
    images = uniform(1, (32, 28, 28, 1))
    logits = jax.jit(model.apply)({"params": params}, images)
    expected = np.asarray(theirs.predict_on_batch(images))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.fixture
def float64():
    """Both compute in float64, where rounding cannot grow to a difference that shows."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    with jax.enable_x64(True):
        yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


@pytest.mark.parametrize("name", models.names())
def test_a_hundred_steps_are_those_of_keras(name, float64):
    # In float32, 100 steps at this rate make a difference of 20 % of one of 1e-7, in Keras alone
    # as well: on TensorFlow and on JAX it gives different losses.
    data = datasets.load("digits", "train[:1024]")
    images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
    # `branched` by its recipe's forms for small batches, the others by theirs for larger ones.
    rows = np.asarray(integers(2, (100, 8 if name == "branched" else 16), 1024))
    overrides = {} if name == "branched" else {"conv_dropout": 0.0, "dense_dropout": 0.0}
    model = models.create(name, dtype=jnp.float64, **overrides)
    tx = optim.create(RECIPES[name], optax.constant_schedule(1e-3))
    theirs = keras_networks.create(name, dropout=False, activation=None)
    params = keras_networks.params_of(theirs)
    for seed, layer in enumerate(params.values()):
        # Not zero: of a blank part of an image, rounding would say where a ReLU passes.
        layer["bias"] = np.asarray(uniform(seed, layer["bias"].shape), np.float64) / 50 - 0.01
    keras_networks.set_params(theirs, params)
    state = random_state(model, tx).replace(params=params, opt_state=tx.init(params))

    @jax.jit
    def train(state):
        def step(state, row):
            batch = steps.gather(images, labels, row)
            batch = batch.replace(images=images[row].astype(jnp.float64) / 255)
            state, metrics = steps.train_step(state, batch, model=model, tx=tx)
            return state, metrics.loss_sum / metrics.count

        return lax.scan(step, state, rows)

    trained, losses = train(state)

    theirs.compile(
        KERAS_OPTIMIZERS[RECIPES[name]](),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    expected = []
    for row in rows:
        theirs.reset_metrics()
        expected.append(float(theirs.train_on_batch(data.images[row] / 255, data.labels[row])))
    assert losses.dtype == jnp.float64
    assert np.mean(expected[-10:]) < 0.8 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    for layer, arrays in keras_networks.params_of(theirs).items():
        for key, array in arrays.items():
            np.testing.assert_allclose(trained.params[layer][key], array, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", models.names())
def test_weights_start_as_in_keras(name):
    theirs = keras_networks.params_of(keras_networks.create(name))
    model = models.create(name)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, theirs)
    for layer, arrays in theirs.items():
        ours, kernel = np.asarray(params[layer]["kernel"]), arrays["kernel"]
        # Of a uniform distribution, the deviation of the deviation is 0.45 / sqrt(n) of it, and
        # the largest of n numbers misses the bound by 1 / n of it.
        tolerance = 5 * 0.45 * np.sqrt(2 / kernel.size)
        assert ours.std() == pytest.approx(kernel.std(), rel=tolerance)
        assert np.abs(ours).max() == pytest.approx(np.abs(kernel).max(), rel=10 / kernel.size)
        assert abs(ours.mean()) < 5 * kernel.std() / np.sqrt(kernel.size)
        assert not params[layer]["bias"].any() and not arrays["bias"].any()


@pytest.mark.parametrize("name", ["convnet", "larger"])
def test_an_epoch_with_a_short_last_batch_is_that_of_keras(name, float64):
    # 107 examples in batches of 25: four, and one of 7.
    data = datasets.load("digits", "train[:107]")
    model = models.create(name, dtype=jnp.float64, conv_dropout=0.0)
    tx = optim.create(RECIPES[name], optax.constant_schedule(1e-3))
    theirs = keras_networks.create(name, dropout=False, activation=None)
    params = keras_networks.params_of(theirs)
    state = random_state(model, tx).replace(params=params, opt_state=tx.init(params))

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    theirs.compile(KERAS_OPTIMIZERS[RECIPES[name]](), loss, metrics=["accuracy"])
    history = theirs.fit(
        data.images / 255, data.labels, batch_size=25, epochs=1, shuffle=False, verbose=0
    ).history

    rows = np.concatenate([np.arange(107), np.full(18, -1)]).reshape(5, 25).astype(np.int32)
    epoch = jax.jit(partial(steps.train_epoch, model=model, tx=tx))
    trained, metrics = epoch(state, jnp.asarray(data.images), jnp.asarray(data.labels), rows)
    means = steps.averages(metrics)
    # The images are scaled in float32.
    np.testing.assert_allclose(means["loss"], history["loss"][0], rtol=1e-5)
    assert means["accuracy"] == pytest.approx(history["accuracy"][0], abs=1e-7)
    expected = keras_networks.params_of(theirs)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=0), trained.params, expected)


def test_the_loss_is_that_of_keras():
    logits, labels = 5 * np.asarray(uniform(0, (50, 10))), np.asarray(integers(1, 50, 10))
    batch = steps.Batch(None, jnp.asarray(labels), jnp.ones(50))
    ours = steps.measure(jnp.asarray(logits), batch)
    one_hot = np.eye(10)[labels]
    categorical = keras.losses.CategoricalCrossentropy()
    expected = float(categorical(one_hot, np.asarray(jax.nn.softmax(logits))))
    assert float(ours.loss_sum) / 50 == pytest.approx(expected, rel=1e-6)


def test_the_watched_part_is_that_of_validation_split():
    class Mean(keras.Model):
        """Its loss is the mean of the numbers that it is given."""

        def call(self, x):
            return x

    numbers = np.arange(1500, dtype=np.float32)[:, None]
    model = Mean()
    model.compile("adam", lambda y_true, y_pred: y_pred)
    history = model.fit(numbers, numbers, validation_split=0.1, batch_size=1500, verbose=0).history
    watched = datasets.load("digits", "train[90%:]").labels
    trained = datasets.load("digits", "train[:90%]").labels
    assert len(watched) == 150 and len(trained) == 1350
    np.testing.assert_array_equal(
        np.concatenate([trained, watched]), datasets.load("digits", "train").labels
    )
    assert history["loss"][0] == pytest.approx(numbers[:1350].mean())
    assert history["val_loss"][0] == pytest.approx(numbers[1350:].mean())


def test_schedules_are_those_of_keras():
    theirs = {
        "cosine": keras.optimizers.schedules.CosineDecay(0.2, 100),
        "exponential": keras.optimizers.schedules.ExponentialDecay(0.2, 100, 0.01),
    }
    for name, schedule in theirs.items():
        ours = optim.create_schedule(name, 0.2, 100)
        for step in (0, 1, 37, 99):
            assert float(ours(step)) == pytest.approx(float(schedule(step)), rel=1e-5)
