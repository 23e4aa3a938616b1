from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from mnist_flax import batches, datasets, layers, models, optim, state, steps, tiles
from mnist_flax.errors import UserError
from tests.helpers import (
    integers,
    loop_jit,
    plain_convolution,
    quick,
    quick_jit,
    random_state,
    uniform,
)


class Constant(nn.Module):
    """Ignores its input: the same logits for every image."""

    logits: tuple[float, ...]

    @nn.compact
    def __call__(self, x, train=False):
        bias = self.param("bias", lambda key: jnp.array(self.logits))
        return jnp.broadcast_to(bias, (len(x), len(self.logits)))


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x.mean((1, 2)))
        return nn.Dense(3)(x)


class Dropping(nn.Module):
    """Its loss shows which of 1,000 inputs dropout let through."""

    @nn.compact
    def __call__(self, x, train=False):
        self.param("unused", nn.initializers.zeros_init(), (1,))
        kept = nn.Dropout(0.5, deterministic=not train)(jnp.ones((len(x), 1000)))
        weights = jnp.sin(jnp.arange(1000.0))
        return jnp.stack([kept @ weights, jnp.zeros(len(x))], -1)


def random_batch(size, shape=(28, 28, 1), classes=10):
    return steps.Batch(uniform(0, (size, *shape)), integers(1, size, classes), jnp.ones(size))


def setting(model, shape=(28, 28, 1), optimizer="adam"):
    tx = optim.create(optimizer, optax.constant_schedule(1e-3))
    return random_state(model, tx, shape), partial(steps.train_step, model=model, tx=tx)


def assert_equal(a, b, **tolerance):
    compare = partial(np.testing.assert_allclose, **tolerance) if tolerance else None
    jax.tree.map(compare or np.testing.assert_array_equal, a, b)


def test_scores_of_constant_logits_are_exact():
    logits = (0.5, 2.0, -1.0)
    model = Constant(logits)
    labels = jnp.array([1, 0, 2, 1, 0, 0, 0, 1])
    mask = jnp.array([1, 1, 1, 1, 1, 0, 0, 0.0])
    batch = steps.Batch(jnp.zeros((8, 4, 4, 1)), labels, mask)
    variables = {"params": {"bias": jnp.array(logits)}}
    metrics = steps.eval_step(variables, batch, model=model)
    assert int(metrics.correct) == 2 and int(metrics.count) == 5
    log_sum = np.log(np.exp(logits).sum())
    expected = sum(log_sum - logits[label] for label in (1, 0, 2, 1, 0))
    assert float(metrics.loss_sum) == pytest.approx(expected, rel=1e-6)


def test_padding_never_counts_even_when_its_loss_is_infinite():
    batch = steps.Batch(jnp.zeros((2, 1, 1, 1)), jnp.array([0, 1]), jnp.array([1.0, 0.0]))
    metrics = steps.measure(jnp.array([[0.0, 0.0], [0.0, -jnp.inf]]), batch)
    assert float(metrics.loss_sum) == pytest.approx(np.log(2))
    assert (int(metrics.correct), int(metrics.count)) == (1, 1)


def test_gather_scales_and_masks():
    images = jnp.arange(3 * 4, dtype=jnp.uint8).reshape(3, 2, 2, 1) * 20
    batch = steps.gather(images, jnp.array([7, 8, 9]), jnp.array([2, -1]))
    np.testing.assert_array_equal(batch.images[0], images[2] / np.float32(255))
    assert batch.images.dtype == jnp.float32
    assert batch.labels[0] == 9
    np.testing.assert_array_equal(batch.mask, [1, 0])


@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_a_padded_batch_trains_as_a_short_one(optimizer):
    start, train_step = setting(models.create("convnet"), optimizer=optimizer)
    train_step = quick_jit(train_step)
    short = random_batch(5)
    padded = jax.tree.map(lambda a: jnp.concatenate([a, a[:3]]), short)
    padded = padded.replace(mask=padded.mask.at[5:].set(0))
    (after_short, short_metrics), (after_padded, padded_metrics) = (
        train_step(start, batch) for batch in (short, padded)
    )
    assert_equal(short_metrics, padded_metrics, rtol=1e-6)
    # The gradients, to which the optimisers' first moments or squares are proportional.
    assert_equal(after_short.opt_state, after_padded.opt_state, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_loss():
    sgd = optax.sgd(1.0)
    start = random_state(Constant((0.0, 1.0)), sgd, (1, 1, 1))
    start = start.replace(params={"bias": jnp.array([0.0, 1.0])})
    batch = steps.Batch(jnp.zeros((4, 1, 1, 1)), jnp.array([0, 0, 0, 1]), jnp.ones(4))
    after, _ = steps.train_step(start, batch, model=Constant((0.0, 1.0)), tx=sgd)
    p = 1 / (1 + np.e)
    np.testing.assert_allclose(after.params["bias"], [0 - (p - 0.75), 1 + (p - 0.75)], rtol=1e-6)
    assert int(after.step) == 1
    np.testing.assert_array_equal(after.key, start.key)


def test_dropout_changes_with_the_step_and_with_nothing_else():
    model = Dropping()
    start, train_step = setting(model, (1, 1, 1))
    batch = random_batch(4, (1, 1, 1), 2)
    train_step = quick_jit(train_step)
    again = [float(train_step(start, batch)[1].loss_sum) for _ in range(2)]
    assert again[0] == again[1]
    later = train_step(start.replace(step=start.step + 1), batch)[1]
    assert float(later.loss_sum) != again[0]
    key = jax.random.fold_in(jax.random.wrap_key_data(start.key), start.step)
    rngs = {"dropout": key}
    logits = model.apply({"params": start.params}, batch.images, train=True, rngs=rngs)
    assert float(steps.measure(logits, batch).loss_sum) == pytest.approx(again[0], rel=1e-6)


@pytest.mark.parametrize("how", ["pmap", "shard_map", "unchecked shard_map"])
def test_flaxs_dropout_drops_on_several_devices_what_it_does_on_one(how):
    start, train_step = setting(Dropping(), (1, 1, 1))
    batch = random_batch(12, (1, 1, 1), 2)
    expected = quick_jit(train_step)(start, batch)[1].loss_sum
    found = parallel_step(train_step, how)(start, batch)[1].loss_sum
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def parallel_step(train_step, how):
    """`train_step` over four devices: from a state and a batch to the state and metrics."""
    whole_step, train_step = train_step, partial(train_step, axis_name="devices")
    if how == "pmap":

        def run(start, batch):
            split = jax.tree.map(lambda a: a.reshape(4, -1, *a.shape[1:]), batch)
            copies = jax.tree.map(lambda a: jnp.stack([a] * 4), start)
            step = quick(jax.pmap(train_step, axis_name="devices"), copies, split)
            results = step(copies, split)
            jax.tree.map(lambda a: np.testing.assert_array_equal(a[0], a[-1]), results)
            return jax.tree.map(lambda a: a[0], results)

        return run
    spec = jax.sharding.PartitionSpec
    if how in ("explicit axes", "jit"):
        kind = {"explicit axes": jax.sharding.AxisType.Explicit, "jit": jax.sharding.AxisType.Auto}
        mesh = jax.make_mesh((4,), ("devices",), axis_types=(kind[how],))
        everywhere, shared = (jax.NamedSharding(mesh, s) for s in (spec(), spec("devices")))

        def shared_out(start, batch):
            with jax.set_mesh(mesh):
                arguments = jax.device_put(start, everywhere), jax.device_put(batch, shared)
                return jax.device_get(quick_jit(whole_step)(*arguments))

        return shared_out
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    # Without a check of what varies, and with it, `grad` treats shared parameters differently.
    return quick_jit(
        jax.shard_map(
            train_step,
            mesh=mesh,
            in_specs=(spec(), spec("devices")),
            out_specs=spec(),
            check_vma=how == "shard_map",
        )
    )


@pytest.mark.parametrize(
    "how", ["pmap", "shard_map", "unchecked shard_map", "explicit axes", "jit"]
)
def test_several_devices_give_the_single_devices_result(how):
    # With dropout.
    model = models.create("larger")
    # By plain descent, as Adam and RMSprop hide a gradient that is twice too large.
    sgd = optax.sgd(0.1)
    start = random_state(model, sgd)
    train_step = partial(steps.train_step, model=model, tx=sgd)
    batch = random_batch(12)
    # Uneven masks: the mean must be over the examples of all devices.
    batch = batch.replace(mask=batch.mask.at[9:].set(0))
    single, metrics = quick_jit(train_step)(start, batch)
    many, many_metrics = parallel_step(train_step, how)(start, batch)
    assert_equal(many.params, single.params, atol=1e-6)
    assert_equal(many_metrics, metrics, rtol=1e-6)


def test_a_gradient_of_ones_own_under_shard_map_is_the_single_devices():
    model = models.create("convnet")
    params, batch = random_state(model, optax.sgd(0.1)).params, random_batch(16)

    def loss(params, batch):
        return steps.measure(model.apply({"params": params}, batch.images), batch).loss_sum

    def gradient(params, batch):
        return jax.grad(lambda params: lax.psum(loss(params, batch), "devices"))(params)

    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    specs = spec(), spec("devices")
    parallel = quick_jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=spec()))
    expected = quick_jit(jax.grad(loss))(params, batch)
    assert_equal(parallel(params, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", models.names())
def test_every_network_takes_images_shared_out_by_explicit_axes(name):
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Explicit,))

    def abstract(tree, *axes):
        sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        like = partial(jax.ShapeDtypeStruct, sharding=sharding)
        return jax.tree.map(lambda a: like(a.shape, a.dtype), tree)

    start, train_step = setting(models.create(name))
    with jax.set_mesh(mesh):
        batch = abstract(random_batch(64), "devices")
        after, _ = jax.eval_shape(train_step, abstract(start), batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, start)


def test_scores_of_several_devices_are_added():
    model = Constant((0.0, 1.0))
    batch = random_batch(12, (1, 1, 1), 2)
    batch = batch.replace(mask=batch.mask.at[9:].set(0))
    variables = {"params": {"bias": jnp.array([0.0, 1.0])}}
    split = jax.tree.map(lambda a: a.reshape(4, -1, *a.shape[1:]), batch)
    score = partial(steps.eval_step, model=model, axis_name="devices")
    total = jax.pmap(score, axis_name="devices", in_axes=(None, 0))(variables, split)
    expected = steps.eval_step(variables, batch, model=model)
    np.testing.assert_array_equal(total.count, [9] * 4)
    np.testing.assert_array_equal(total.correct, [expected.correct] * 4)


@pytest.fixture(scope="module")
def epoch_setting():
    model = models.create("larger")
    start, train_step = setting(model)
    tx = optim.create("adam", optax.constant_schedule(1e-3))
    images = integers(1, (50, 28, 28, 1), 256, jnp.uint8)
    labels = integers(2, 50, 10)
    # The last is filled up.
    rows = jnp.asarray(batches.train_batches(0, 0, 50, 8))[1:]
    epoch = jax.jit(partial(steps.train_epoch, model=model, tx=tx))
    return start, train_step, epoch, (images, labels), rows


@pytest.mark.parametrize("network", models.names())
def test_a_hundred_steps_follow_the_plain_convolution(monkeypatch, network):
    # In the forms of a recipe's batch: that of `branched` is one block, as of 4 images, and the
    # others' is several, here of 3 images, the last filled up.
    monkeypatch.setattr(layers, "_by_platform", layers._by_platform.__wrapped__)
    count = 4 if network == "branched" else 5
    if network != "branched":
        splitter = tiles.splitter
        monkeypatch.setattr(tiles, "_MIN_SPLIT", 1)
        monkeypatch.setattr(tiles, "splitter", lambda batch, most: splitter(batch, min(most, 3)))
    # In float64, as at this rate 100 steps can make 20 % of a difference of 1e-7.
    with jax.enable_x64(True):
        images, labels = map(jnp.asarray, datasets.load("digits", "train"))
        rows = integers(3, (100, count), len(labels))
        model = models.create(network, dtype=jnp.float64)
        optimizer = "rmsprop" if network == "convnet" else "adam"
        tx = optim.create(optimizer, optax.constant_schedule(1e-3))
        start = random_state(model, tx)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), start.params)
        start = start.replace(params=params, opt_state=tx.init(params))

        def train(loop):
            def step(state, row):
                batch = steps.gather(images, labels, row)
                batch = batch.replace(images=images[row].astype(jnp.float64) / 255)
                state, metrics = steps.train_step(state, batch, model=model, tx=tx)
                return state, metrics.loss_sum / len(row)

            state, losses = loop(step, start, rows)
            return state.params, np.asarray(losses)

        def one_by_one(step, state, rows):
            found, step = [], loop_jit(step, donate_argnums=0)
            for row in rows:
                state, loss = step(state, row)
                found.append(loss)
            return state, found

        params, ours = train(loop_jit(lax.scan, static_argnums=0))
        pool = partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))

        def conv_relu(x, kernel, bias, padding):
            return nn.relu(plain_convolution(x, kernel, padding) + bias)

        monkeypatch.setattr(layers, "conv_relu", conv_relu)
        monkeypatch.setattr(layers, "conv_relu_pool", lambda *operands: pool(conv_relu(*operands)))
        monkeypatch.setattr(models, "conv_relu_twice", lambda x, first, second: second(first(x)))
        # In a loop on CPU it is many times slower.
        plain_params, plain = train(one_by_one)
    assert ours.dtype == np.float64 and (ours != plain).any()
    assert np.mean(ours[-10:]) < np.mean(ours[:10])
    np.testing.assert_allclose(ours, plain, rtol=1e-9)
    assert_equal(params, plain_params, rtol=1e-6, atol=1e-9)


def test_an_epoch_is_its_steps_one_after_the_other(epoch_setting):
    start, train_step, epoch, arrays, rows = epoch_setting
    after, metrics = epoch(start, *arrays, rows)
    one, each = start, []
    train_step = quick_jit(train_step)
    for row in rows:
        one, step_metrics = train_step(one, steps.gather(*arrays, row))
        each.append(step_metrics)
    total = jax.tree.map(lambda *numbers: sum(numbers), *each)
    assert int(after.step) == 6 and int(metrics.count) == 42
    assert_equal(metrics, total, rtol=1e-5)
    assert_equal(after.params, one.params, atol=1e-4)


def test_an_epoch_in_pieces_is_bitwise_the_same(epoch_setting):
    start, _, epoch, arrays, rows = epoch_setting
    whole, _ = epoch(start, *arrays, rows)
    middle, _ = epoch(start, *arrays, rows[:2])
    pieces, _ = epoch(middle, *arrays, rows[2:])
    assert_equal(whole, pieces)


def test_batch_statistics_are_carried():
    model = Normalised()
    start, train_step = setting(model, (4, 4, 3))
    batch = random_batch(16, (4, 4, 3), 3)
    after, _ = quick_jit(train_step)(start, batch)
    mean = batch.images.mean((0, 1, 2))
    before, now = (s.batch_stats["BatchNorm_0"]["mean"] for s in (start, after))
    np.testing.assert_allclose(now, 0.9 * before + 0.1 * mean, rtol=1e-5)


def test_state_is_determined_by_the_seed():
    tx = optim.create("adam", optax.constant_schedule(1e-3))
    create = partial(state.create, model=models.create("convnet"), tx=tx, image_shape=(28, 28, 1))
    create = quick_jit(create)
    first, again, other = create(3), create(3), create(4)
    assert_equal(first, again)
    assert (first.params["Dense_0"]["kernel"] != other.params["Dense_0"]["kernel"]).any()
    assert (first.key != other.key).any()


def test_images_of_the_wrong_scale_are_refused():
    model = models.create("larger")
    start, train_step = setting(model)
    data = uniform(0, (8, 28, 28, 1)), integers(1, 8, 10)
    epoch = partial(steps.train_epoch, model=model, tx=optim.without_schedule("adam"))
    with pytest.raises(UserError, match="uint8 in .*, and here are float32: scaled ones make a"):
        jax.eval_shape(epoch, start, *data, integers(2, (2, 4), 8))
    batch = random_batch(4)
    with pytest.raises(UserError, match="floating-point numbers in .*, and here are uint8"):
        jax.eval_shape(train_step, start, batch.replace(images=batch.images.astype(jnp.uint8)))


def test_an_epoch_in_float64_takes_numpys_arrays():
    with jax.enable_x64(True):
        model, tx = models.create("larger", dtype=jnp.float64), optim.without_schedule("adam")
        start = random_state(model, tx)
        images, labels = np.zeros((8, 28, 28, 1), np.uint8), np.arange(8)
        rows = np.arange(8, dtype=np.int32).reshape(2, 4)
        epoch = partial(steps.train_epoch, model=model, tx=tx)
        _, metrics = jax.eval_shape(lambda state: epoch(state, images, labels, rows), start)
        score = partial(steps.eval_epoch, model=model)
        scored = jax.eval_shape(
            lambda params: score({"params": params}, images, labels, rows), start.params
        )
    for sums in (metrics, scored):
        assert (sums.loss_sum.dtype, sums.correct.dtype) == (jnp.float32, jnp.int32)


def test_losses_of_16_bit_logits_are_in_float32():
    logits = jnp.array([[1.0, 2.0, 3.0]], jnp.bfloat16)
    batch = steps.Batch(jnp.zeros((1, 1, 1, 1)), jnp.array([1]), jnp.ones(1))
    metrics = steps.measure(logits, batch)
    assert metrics.loss_sum.dtype == jnp.float32
    np.testing.assert_allclose(metrics.loss_sum, np.log(1 + np.exp(1) + np.exp(-1)), rtol=1e-6)


def test_a_network_may_want_to_be_told_whether_it_trains():
    class Strict(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(x.reshape(len(x), -1))

    tx = optim.without_schedule("adam")
    start = jax.eval_shape(lambda: state.create(0, Strict(), tx, (2, 2, 1)))
    assert start.params["Dense_0"]["kernel"].shape == (4, 3)


@pytest.mark.parametrize("name", models.names())
def test_every_network_trains_in_bfloat16(name):
    model = models.create(name, dtype=jnp.bfloat16)
    start, step = setting(model)
    after, metrics = jax.eval_shape(step, start, random_batch(16))
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [
        leaf.dtype for leaf in jax.tree.leaves(start)
    ]
    assert metrics.loss_sum.dtype == jnp.float32
