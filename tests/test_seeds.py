"""Several seeds trained at once are runs of their own."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from mnist_flax import config as config_lib
from mnist_flax import (
    environment,
    epochs,
    evaluate,
    export_keras,
    import_keras,
    keras_files,
    loaders,
    models,
    optim,
    parallel,
    parts,
    rundir,
    signals,
    steps,
    train,
    trained,
)
from mnist_flax import state as state_lib
from mnist_flax.errors import UserError
from tests.helpers import quick_jit

pytestmark = pytest.mark.usefixtures("compiled_once")


def seeds_config(**overrides):
    """Two epochs of five steps, the last of 10, of two networks by two devices each."""
    config = config_lib.recipe(
        "small", "mnist", model="baseline", data__name="digits", batch_size=20, epochs=2, seed=7
    )
    config.data.train_split = "train[:90]"
    config.data.watch_split = "train[90:150]"
    config.data.test_split = "test[:70]"
    config.num_seeds, config.parallel = 2, 4
    config.update_from_flattened_dict(overrides)
    return config


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, prepared, compiled_once):
    run_dir = tmp_path_factory.mktemp("seeds") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(prepared))
        summary = train.train_and_evaluate(seeds_config(), run_dir)
    return run_dir, summary


@pytest.mark.parametrize("devices", [1, 3])
def test_each_seed_is_a_run_of_its_own_on_any_devices(devices, whole_run, tmp_path):
    run_dir, summary = whole_run
    rows = rundir.read_metrics(run_dir)
    assert [[each["seed"] for each in row["seeds"]] for row in rows] == [[7, 8], [7, 8]]
    # The second, whose every key, order and place is another than the first's.
    single = train.train_and_evaluate(seeds_config(seed=8, num_seeds=1, parallel=devices), tmp_path)
    for row, expected in zip(rows, rundir.read_metrics(tmp_path), strict=True):
        for key in ("train_loss", "watch_loss"):
            assert row["seeds"][1][key] == pytest.approx(expected[key], rel=1e-5)
        assert row["step"] == expected["step"]
    assert summary["seeds"][1]["test_loss"] == pytest.approx(single["test_loss"], rel=1e-5)
    ours = trained.load(run_dir, seed=8)
    assert (ours.step, ours.image_shape) == (10, (28, 28, 1))
    expected = trained.load(tmp_path).variables
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), ours.variables, expected)
    assert ours.evaluate()["accuracy"] == summary["seeds"][1]["test_accuracy"]


@pytest.mark.parametrize("at_once", [False, True])
def test_several_seeds_of_a_device_are_runs_of_their_own(at_once, tmp_path, monkeypatch):
    """Three seeds on one device: each takes its turn, or, as on GPU and TPU, all in one step."""
    if at_once:
        choose = "platform_dependent"
        monkeypatch.setattr(epochs.jax.lax, choose, lambda *args, cpu, default: default(*args))
    overrides = {"num_seeds": 3, "parallel": 1, "epochs": 1, "data.watch_split": ""}
    config = seeds_config(**overrides, name=f"at_once_{at_once}")
    ours = train.train_and_evaluate(config, tmp_path / "three")["seeds"][2]
    overrides |= {"num_seeds": 1, "seed": 9}
    expected = train.train_and_evaluate(seeds_config(**overrides), tmp_path / "one")
    assert ours["seed"] == 9
    assert ours["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-5)
    ours, expected = trained.load(tmp_path / "three", seed=9), trained.load(tmp_path / "one")
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), ours.variables, expected.variables)


def test_the_summary_has_each_seed_and_their_statistics(whole_run):
    run_dir, summary = whole_run
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    accuracies = np.array([each["test_accuracy"] for each in summary["seeds"]])
    assert len(set(accuracies)) > 1
    assert summary["test_accuracy"] == pytest.approx(accuracies.mean())
    assert summary["test_accuracy_deviation"] == pytest.approx(accuracies.std(ddof=1))
    assert summary["test_accuracy_min"] == accuracies.min()
    assert summary["test_accuracy_max"] == accuracies.max()
    assert (summary["seed"], summary["parameters"]) == (7, 592_074)
    losses = [each["test_loss"] for each in summary["seeds"]]
    assert summary["test_loss"] == pytest.approx(np.mean(losses))
    for row in rundir.read_metrics(run_dir):
        for key in ("train_loss", "train_accuracy", "watch_loss", "watch_accuracy"):
            assert row[key] == pytest.approx(np.mean([each[key] for each in row["seeds"]]))


def test_a_stopped_run_of_several_seeds_resumes_bit_for_bit(whole_run, tmp_path, monkeypatch):
    run_dir, summary = whole_run
    config = seeds_config(**{"checkpoint.every_steps": 2})
    epoch_row, advance = train.results.epoch_row, train.report.advance

    def stop(*args):
        signals.signal.raise_signal(signals.signal.SIGTERM)
        return epoch_row(*args)

    monkeypatch.setattr(train.results, "epoch_row", stop)
    with pytest.raises(signals.Stopped):
        train.train_and_evaluate(config, tmp_path)
    monkeypatch.undo()

    def stop_inside(bar, position):
        signals.signal.raise_signal(signals.signal.SIGTERM)
        return advance(bar, position)

    monkeypatch.setattr(train.report, "advance", stop_inside)
    with pytest.raises(signals.Stopped):
        train.train_and_evaluate(config, tmp_path)
    monkeypatch.undo()
    assert trained.load(tmp_path, seed=7).step == 7
    resumed = train.train_and_evaluate(config, tmp_path)
    assert resumed["seeds"] == summary["seeds"]
    for seed in (7, 8):
        ours, expected = (trained.load(folder, seed=seed) for folder in (tmp_path, run_dir))
        jax.tree.map(np.testing.assert_array_equal, ours.variables, expected.variables)


def test_streamed_seeds_are_bit_for_bit_the_same(whole_run, tmp_path):
    run_dir, summary = whole_run
    streamed = train.train_and_evaluate(seeds_config(**{"data.loader": "stream"}), tmp_path)
    assert streamed["seeds"] == summary["seeds"]
    ours, expected = (trained.load(folder, seed=8) for folder in (tmp_path, run_dir))
    jax.tree.map(np.testing.assert_array_equal, ours.variables, expected.variables)


@pytest.mark.parametrize(
    ("num_seeds", "cores", "batch_size", "shape"),
    [
        (8, 4, 20, (4, 1)),
        (2, 4, 40, (2, 2)),
        (2, 4, 8, (2, 1)),
        (3, 2, 40, (1, 2)),
        (1, 3, 8, (1, 1)),
        (1, 2, 200, (1, 2)),
        (10, 2, 200, (2, 1)),
        (10, 3, 500, (1, 3)),
        (1, 16, 200, (1, 12)),
        (7, 16, 64, (7, 2)),
        (10, 16, 64, (5, 3)),
        (10, 16, 8, (10, 1)),
        (10, 128, 200, (10, 12)),
    ],
)
def test_seeds_and_batches_take_as_many_devices_as_they_can(
    num_seeds, cores, batch_size, shape, monkeypatch
):
    monkeypatch.setattr(parallel.environment, "cores", lambda: cores)
    config = seeds_config(num_seeds=num_seeds, batch_size=batch_size, parallel=0)
    assert parallel._shape(config, cores) == shape
    if cores <= len(jax.devices()):
        assert parallel.create_mesh(config).devices.shape == shape


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_seeds": 0}, "num_seeds=0 must be at least 1"),
        ({"seed": 2**32 - 1}, "the seed 4294967296 must be below"),
    ],
)
def test_seeds_that_cannot_be_run_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        config_lib.validate(seeds_config(**overrides))


def test_more_seeds_than_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"1,000,000,000 seeds need .* set a lower num_seeds"):
        train.train_and_evaluate(seeds_config(num_seeds=10**9, parallel=1), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("devices", "copies"), [(1, 1), (4, 2)])
def test_seeds_need_memory_for_each_device_that_shares_a_batch(monkeypatch, devices, copies):
    config = seeds_config(num_seeds=2, parallel=devices)
    mesh = parallel.create_mesh(config)
    model, tx = parts.create_model(config, 10), parts.create_optimizer(config, 100)
    abstract = parts.abstract_state(config, model, tx, (28, 28, 1), mesh)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)]
    needed = copies * sum(sizes)
    monkeypatch.setattr(environment, "free_memory", lambda: (needed, None))
    parts.abstract_state(config, model, tx, (28, 28, 1), mesh)
    monkeypatch.setattr(environment, "free_memory", lambda: (needed - 1, None))
    with pytest.raises(UserError, match="2 seeds need"):
        parts.abstract_state(config, model, tx, (28, 28, 1), mesh)


def test_one_seed_is_compiled_without_an_axis_of_seeds(monkeypatch, prepared):
    monkeypatch.setattr(epochs, "_each_seed", None)
    config = seeds_config(num_seeds=1, parallel=2)
    mesh = parallel.create_mesh(config)
    loader = loaders.create("resident", "digits", "train[:90]", "", mesh)
    model, tx = parts.create_model(config, 10), parts.create_optimizer(config, 90)
    state = parts.abstract_state(config, model, tx, loader.image_shape, mesh)
    assert state.step.shape == () and state.params["Dense_0"]["bias"].shape == (128,)
    epoch = partial(steps.train_epoch, model=model, tx=tx)
    epochs.compile_epoch(epoch, mesh, state, loader, 20, steps=5, length=5)


def test_one_seed_is_chosen(whole_run, capsys, monkeypatch):
    run_dir, summary = whole_run
    with pytest.raises(
        UserError, match="has the seeds 7 to 8: say which, such as --seed=7, or seed=7 in P"
    ):
        trained.load(run_dir)
    with pytest.raises(UserError, match="has no seed 10: its seeds are 7, 8"):
        trained.load(run_dir, seed=10)
    monkeypatch.setattr("sys.argv", ["evaluate", str(run_dir), "--seed=8"])
    evaluate.main()
    accuracy = summary["seeds"][1]["test_accuracy"]
    assert f"Test accuracy: {accuracy:.2%}" in capsys.readouterr().out


def test_one_seed_is_exported(whole_run, tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.keras"
    monkeypatch.setattr("sys.argv", ["export_keras", str(whole_run[0]), str(path), "--seed=8"])
    export_keras.main()
    assert "model.keras" in capsys.readouterr().out
    content = keras_files.read(path)
    params = import_keras.params_of(content, *import_keras.recognise(content, None)[1:])
    expected = trained.load(whole_run[0], seed=8).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_finished_run_of_several_seeds_shows_them(whole_run, capsys):
    run_dir, summary = whole_run
    assert train.train_and_evaluate(seeds_config(), run_dir) == summary
    out = capsys.readouterr().out
    for each in summary["seeds"]:
        assert f"Test accuracy of seed {each['seed']}: {each['test_accuracy']:.2%}\n" in out
    assert f"± {summary['test_accuracy_deviation']:.2%}, from" in out
    assert "--seed=7" in out


def test_a_seed_means_the_same_whatever_jaxs_default_generator_is():
    model, tx = models.create("convnet"), optim.without_schedule("adam")
    images, labels = np.zeros((8, 28, 28, 1), np.float32), np.zeros(8, np.int32)
    batch = steps.Batch(images, labels, np.ones(8, np.float32))

    def trained():
        start = state_lib.create(3, model, tx, (28, 28, 1))
        return start, steps.train_step(start, batch, model=model, tx=tx)[1]

    # Each traced anew.
    expected = quick_jit(lambda: trained())()
    with jax.default_prng_impl("rbg"):
        found = quick_jit(lambda: trained())()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
