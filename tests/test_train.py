import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnist_flax import (
    batches,
    checkpoint,
    datasets,
    environment,
    loaders,
    models,
    optim,
    parallel,
    parts,
    report,
    results,
    rundir,
    scoring,
    signals,
    steps,
    train,
    trained,
)
from mnist_flax import config as config_lib
from mnist_flax import state as state_lib
from mnist_flax.errors import UserError
from mnist_flax.position import Position
from tests.helpers import quick_jit

pytestmark = pytest.mark.usefixtures("compiled_once")


def small_config(**overrides):
    """Three epochs of six steps on 90 digits by two devices, the last step being of 10."""
    config = config_lib.recipe(
        "small", "mnist", model="baseline", data__name="digits", batch_size=16, epochs=3
    )
    config.data.train_split = "train[:90]"
    config.data.watch_split = "train[90:150]"
    config.data.test_split = "test[:70]"
    config.parallel = 2
    config.update_from_flattened_dict(overrides)
    return config


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, prepared, compiled_once):
    """A run that was never stopped, and its summary."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(prepared))
        summary = train.train_and_evaluate(small_config(), run_dir)
    return run_dir, summary


def metrics(run_dir):
    timings = ("seconds", "images_per_second")
    return [
        {k: v for k, v in row.items() if k not in timings} for row in rundir.read_metrics(run_dir)
    ]


def assert_same_run(run_dir, other):
    a, b = (trained.load(folder) for folder in (run_dir, other))
    assert a.step == b.step
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    assert metrics(run_dir) == metrics(other)


def test_a_run_leaves_what_the_contract_says(whole_run):
    run_dir, summary = whole_run
    assert {p.name for p in run_dir.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        ".lock",
    }
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    facts = {
        "config_name": "small",
        "dataset": "digits",
        "model": "baseline",
        "parameters": 592_074,
        "train_examples": 90,
        "test_examples": 70,
        "epochs": 3,
        "seed": 0,
    }
    assert facts.items() <= summary.items()
    assert set(summary) - set(facts) == {
        "test_loss",
        "test_accuracy",
        "wall_seconds",
        "compile_seconds",
        "images_per_second",
        "device",
        "versions",
    }
    assert summary["wall_seconds"] > summary["compile_seconds"] > 0
    assert summary["versions"]["jax"] == jax.__version__
    assert json.loads((run_dir / "config.json").read_text()) == small_config().to_dict()
    rows = rundir.read_metrics(run_dir)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 6), (2, 12), (3, 18)]
    assert rows[2]["train_loss"] < rows[0]["train_loss"]
    assert rows[2]["train_accuracy"] * 90 == pytest.approx(round(rows[2]["train_accuracy"] * 90))
    watched = trained.load(run_dir).evaluate("train[90:150]")
    assert rows[2]["watch_loss"] == pytest.approx(watched["loss"], rel=1e-5)
    assert rows[2]["watch_accuracy"] == pytest.approx(watched["accuracy"])


def test_the_score_is_that_of_the_last_epochs_parameters(whole_run):
    run_dir, summary = whole_run
    run = trained.load(run_dir)
    arrays = datasets.load("digits", "test[:70]")
    probabilities = run.predict(arrays.images)
    assert (probabilities.argmax(1) == arrays.labels).mean() == pytest.approx(
        summary["test_accuracy"]
    )
    loss = -np.log(probabilities[np.arange(70), arrays.labels]).mean()
    assert loss == pytest.approx(summary["test_loss"], rel=1e-4)


def test_a_finished_run_says_so_and_does_nothing(whole_run, capsys, monkeypatch):
    run_dir, summary = whole_run
    monkeypatch.setattr(parts, "load_data", None)
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    assert train.train_and_evaluate(small_config(), run_dir) == summary
    assert "is finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}


def test_a_run_whose_metrics_were_deleted_gets_its_summary_without_a_speed(whole_run, tmp_path):
    run_dir, summary = whole_run
    shutil.copytree(run_dir, tmp_path / "run")
    for name in ("summary.json", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    again = train.train_and_evaluate(small_config(), tmp_path / "run")
    assert again["images_per_second"] is None
    assert [again[key] for key in ("test_loss", "test_accuracy")] == [
        summary[key] for key in ("test_loss", "test_accuracy")
    ]


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_stopped_after_any_epoch_ends_bitwise_the_same(
    whole_run, tmp_path, monkeypatch, epoch
):
    report_epoch = report.epoch

    def stop(row, config):
        report_epoch(row, config)
        if row["epoch"] == epoch:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(report, "epoch", stop)
        with pytest.raises(signals.Stopped, match="SIGTERM"):
            train.train_and_evaluate(small_config(), tmp_path / "run")
    assert trained.load(tmp_path / "run").step == 6 * epoch
    assert not (tmp_path / "run/summary.json").exists()
    summary = train.train_and_evaluate(small_config(), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole_run[0])
    assert summary["test_loss"] == whole_run[1]["test_loss"]


def test_a_run_stopped_inside_an_epoch_ends_bitwise_the_same(tmp_path, monkeypatch):
    # Pieces of two steps, so that there is an inside.
    config = small_config(**{"checkpoint.every_steps": 2, "epochs": 2})
    train.train_and_evaluate(config, tmp_path / "whole")

    advance, calls = report.advance, []

    def interrupt(bar, position):
        advance(bar, position)
        calls.append(position.count)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(report, "advance", interrupt)
        with pytest.raises(signals.Stopped, match="SIGINT"):
            train.train_and_evaluate(config, tmp_path / "run")
    assert calls == [32, 64, 90, 32]
    assert trained.load(tmp_path / "run").step == 8
    train.train_and_evaluate(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_goes_on_in_pieces_of_another_length(tmp_path, monkeypatch):
    # As on another kind of device.
    config = small_config(epochs=2, name="other pieces")
    whole = train.train_and_evaluate(config, tmp_path / "whole")

    advance = report.advance

    def interrupt(bar, position):
        advance(bar, position)
        # Once: a second signal ends the process.
        if position.count == 32:
            os.kill(os.getpid(), signal.SIGTERM)

    compile_programs = parts.compile_programs

    def in_pieces_of(length):
        return lambda *args: compile_programs(*args)._replace(length=length)

    # Not of 1: a loop of one step is none, and may round otherwise.
    monkeypatch.setattr(parts, "compile_programs", in_pieces_of(2))
    with monkeypatch.context() as patch:
        patch.setattr(report, "advance", interrupt)
        with pytest.raises(signals.Stopped):
            train.train_and_evaluate(config, tmp_path / "run")
    assert trained.load(tmp_path / "run").step == 4
    monkeypatch.setattr(parts, "compile_programs", in_pieces_of(4))
    summary = train.train_and_evaluate(config, tmp_path / "run")
    assert summary["test_loss"] == whole["test_loss"]
    both = [trained.load(tmp_path / name).variables for name in ("run", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_checkpoints_of_another_configuration_are_refused(whole_run, tmp_path):
    shutil.copytree(whole_run[0], tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    other = small_config(seed=5)
    (tmp_path / "run/config.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(UserError, match="config.json .seed is 0 there and 5 now"):
        train.train_and_evaluate(other, tmp_path / "run")


def test_a_resumed_run_counts_the_time_of_all_its_starts(tmp_path, monkeypatch):
    def stop(row, config):
        os.kill(os.getpid(), signal.SIGTERM)

    record = Position.record
    with monkeypatch.context() as patch:
        patch.setattr(report, "epoch", stop)
        patch.setattr(
            Position,
            "record",
            lambda self: record(self) | {"wall_seconds": 1000.0, "compile_seconds": 500.0},
        )
        with pytest.raises(signals.Stopped):
            train.train_and_evaluate(small_config(), tmp_path / "run")
    summary = train.train_and_evaluate(small_config(), tmp_path / "run")
    assert 1000 < summary["wall_seconds"] < 1500
    assert 500 < summary["compile_seconds"] < 1000


def test_the_speed_of_an_epoch_is_that_of_all_its_pieces_and_seeds():
    each = steps.Metrics(np.float32([30, 10]), np.int32([8, 9]), np.int32([10, 10]))
    position = Position(epoch=2).after(each, 1.5).after(each, 2.5)
    config = small_config(num_seeds=2)
    row = results.epoch_row(config, position, 7, {"loss": [1.0, 3.0], "accuracy": [0.5, 0.7]})
    assert (row["epoch"], row["step"], row["seconds"]) == (3, 7, 4)
    assert row["images_per_second"] == 40 / 4
    assert (row["train_loss"], row["train_accuracy"]) == (2, pytest.approx(0.85))
    assert (row["watch_loss"], row["watch_accuracy"]) == (2, 0.6)
    score = {"loss": [0.1, 0.3], "accuracy": [0.9, 0.8], "count": 70}
    found = results.summary(config, 20, 5, score, position.next_epoch(), [row, row], 2)
    # Two epochs of 20 images by two seeds in 4 s each.
    assert found["images_per_second"] == 10
    again = position.next_epoch().after(each, 1.0)
    assert (again.epoch, again.seconds, again.count.tolist()) == (3, 1, [10, 10])


def test_what_is_shown_of_an_epoch_and_a_score(capsys):
    row = {"epoch": 2, "train_loss": 0.5, "train_accuracy": 0.81, "watch_loss": 0.25}
    row |= {"watch_accuracy": 0.93, "images_per_second": 1234.4, "seconds": 5.67}
    report.epoch(row, small_config(epochs=10))
    report.score({"loss": 0.125, "accuracy": 0.975, "count": 200})
    assert capsys.readouterr().out == (
        "epoch  2/10  loss 0.5000  accuracy 81.00%  |  train[90:150]: loss 0.2500  "
        "accuracy 93.00%  |  1,234 images/s  5.7 s\n"
        "Test loss: 0.1250\nTest accuracy: 97.50% (195 of 200 right)\nError: 2.50%\n"
    )


def test_a_signal_while_the_last_checkpoint_is_written_waits(tmp_path, monkeypatch):
    close = checkpoint.ocp.CheckpointManager.close

    def stopped(self):
        monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "close", close)
        signal.raise_signal(signal.SIGTERM)
        close(self)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "close", stopped)
    with pytest.raises(signals.Stopped):
        train.train_and_evaluate(small_config(epochs=1), tmp_path / "run")
    assert trained.load(tmp_path / "run").step == 6


def test_a_watched_loss_that_is_not_finite_is_a_clear_error(tmp_path, monkeypatch):
    averages = steps.averages

    def infinite(*sums):
        return averages(*sums) | {"loss": float("inf")}

    monkeypatch.setattr(scoring.steps, "averages", infinite)
    with pytest.raises(UserError, match="diverged in epoch 1: the watched loss became NaN or inf"):
        train.train_and_evaluate(small_config(), tmp_path / "run")


def test_a_run_on_another_data_set_than_before_is_refused(whole_run, tmp_path, monkeypatch):
    shutil.copytree(whole_run[0], tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    load = datasets.load

    def fewer(name, split, manual_dir=""):
        return load(name, "train[:80]" if split == "train[:90]" else split, manual_dir)

    monkeypatch.setattr(datasets, "load", fewer)
    with pytest.raises(UserError, match="train_examples was 90 and is 80; prepare that one"):
        train.train_and_evaluate(small_config(), tmp_path / "run")
    assert trained.load(tmp_path / "run").step == 18


def test_a_resumed_run_makes_no_second_state(whole_run, tmp_path, monkeypatch):
    shutil.copytree(whole_run[0], tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    monkeypatch.setattr(parts, "initial_state", None)
    summary = train.train_and_evaluate(small_config(), tmp_path / "run")
    assert summary["test_loss"] == whole_run[1]["test_loss"]


def test_a_run_that_is_under_way_is_not_begun_again(whole_run, tmp_path):
    with (
        rundir.locked(tmp_path / "run", small_config()),
        pytest.raises(UserError, match="another process is training"),
    ):
        train.train_and_evaluate(small_config(), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_loop_of_single_steps_on_one_device_is_a_run(whole_run, prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    config = small_config()
    model, tx = parts.create_model(config, 10), parts.create_optimizer(config, 90)
    images, labels = map(jnp.asarray, datasets.load("digits", "train[:90]")[:2])
    state = state_lib.create(0, model, tx, images.shape[1:])
    step = quick_jit(partial(steps.train_step, model=model, tx=tx))
    for epoch, expected in enumerate(rundir.read_metrics(whole_run[0])):
        metrics = []
        for row in batches.train_batches(0, epoch, 90, 16):
            state, of_step = step(state, steps.gather(images, labels, row))
            metrics.append(of_step)
        total = sum(metrics[1:], metrics[0])
        loss = float(total.loss_sum) / int(total.count)
        assert loss == pytest.approx(expected["train_loss"], rel=1e-5)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="a run has one process, and here are 2"):
        train.train_and_evaluate(small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole_run, tmp_path, monkeypatch):
    save = checkpoint.save

    def kill(manager, state, *rest):
        if state.step == 18:
            raise Killed
        save(manager, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", kill)
        with pytest.raises(Killed):
            train.train_and_evaluate(small_config(), tmp_path / "run")
    # The third epoch's row was written, its checkpoint was not.
    assert len(metrics(tmp_path / "run")) == 3
    assert trained.load(tmp_path / "run").step == 12
    train.train_and_evaluate(small_config(), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole_run[0])


def test_an_epoch_is_saved_before_it_is_shown(tmp_path, monkeypatch):
    def closed(row, config):
        raise BrokenPipeError

    monkeypatch.setattr(report, "epoch", closed)
    with pytest.raises(BrokenPipeError):
        train.train_and_evaluate(small_config(), tmp_path / "run")
    assert trained.load(tmp_path / "run").step == 6


def test_splits_of_different_sizes_are_refused_before_a_run_folder_is_made(tmp_path, monkeypatch):
    create = loaders.create

    def cropped(kind, name, split, *rest):
        loader = create(kind, name, split, *rest)
        if split.startswith("test"):
            loader.image_shape = (20, 20, 1)
        return loader

    monkeypatch.setattr(loaders, "create", cropped)
    with pytest.raises(UserError, match="differ in size from split to split"):
        train.train_and_evaluate(small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_equal_splits_are_loaded_once(monkeypatch):
    loaded = []
    create = loaders.create
    monkeypatch.setattr(loaders, "create", lambda *args: loaded.append(args[2]) or create(*args))
    config = small_config(**{"data.watch_split": "train[:90]"})
    data = parts.load_data(config, parallel.single_mesh())
    assert data.watch is data.train and loaded == ["train[:90]", "test[:70]"]


def test_larger_images_are_scored_fewer_at_once():
    assert scoring.batch_size((28, 28, 1)) == scoring.batch_size((8, 8, 3)) == 500
    assert scoring.batch_size((56, 56, 3)) == 125
    assert scoring.batch_size((3000, 2000, 3)) == 1


def test_a_killed_run_goes_on_inside_an_epoch(tmp_path, monkeypatch):
    config = small_config(**{"checkpoint.every_steps": 2, "epochs": 2})
    train.train_and_evaluate(config, tmp_path / "whole")
    counts = []

    def kill(bar, position):
        counts.append(int(position.count))
        if len(counts) == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(report, "advance", kill)
        with pytest.raises(Killed):
            train.train_and_evaluate(config, tmp_path / "run")
    assert counts == [32, 64, 90] * 2
    assert trained.load(tmp_path / "run").step == 10
    train.train_and_evaluate(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_best_and_latest_are_kept_where_the_watched_split_is_not_the_test_set(
    tmp_path, monkeypatch
):
    epoch_row = results.epoch_row

    def worsening(config, position, step, watch):
        row = epoch_row(config, position, step, watch)
        return row | {"watch_accuracy": 0.9 - position.epoch / 10}

    monkeypatch.setattr(results, "epoch_row", worsening)
    config = small_config(epochs=4)
    train.train_and_evaluate(config, tmp_path / "run")
    kept = sorted(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [6, 18, 24]

    config.data.watch_split = config.data.test_split
    train.train_and_evaluate(config, tmp_path / "watching the test set")
    kept = sorted(int(p.name) for p in (tmp_path / "watching the test set/checkpoints").iterdir())
    assert kept == [18, 24]


def break_after_step_6(monkeypatch, change):
    """Has `change` alter state and metrics of each later piece."""
    compile_programs = parts.compile_programs

    def breaking(*args):
        programs = compile_programs(*args)

        def train_piece(state, piece):
            state, metrics = programs.train(state, piece)
            return change(state, metrics) if np.max(state.step) > 6 else (state, metrics)

        return programs._replace(train=train_piece)

    monkeypatch.setattr(parts, "compile_programs", breaking)


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    def endless_loss(state, metrics):
        return state, metrics.replace(loss_sum=metrics.loss_sum * np.inf)

    break_after_step_6(monkeypatch, endless_loss)
    with pytest.raises(UserError, match=r"epoch 2: the loss became.*checkpoint of step 6 is kept"):
        train.train_and_evaluate(small_config(), tmp_path / "run")
    assert trained.load(tmp_path / "run").step == 6


@pytest.mark.parametrize(("seeds", "what"), [(1, "a parameter"), (2, "a parameter of seed 1")])
def test_parameters_that_diverge_after_the_last_loss_are_not_saved(
    tmp_path, monkeypatch, seeds, what
):
    def broken_bias(state, metrics):
        layer = state.params["Dense_1"]
        # The last seed's, where there are several.
        bias = layer["bias"].at[-1].set(np.nan)
        params = state.params | {"Dense_1": layer | {"bias": bias}}
        return state.replace(params=params), metrics

    break_after_step_6(monkeypatch, broken_bias)
    with pytest.raises(UserError, match=f"epoch 2: {what} became.*checkpoint of step 6 is kept"):
        train.train_and_evaluate(small_config(num_seeds=seeds), tmp_path / "run")
    assert trained.load(tmp_path / "run", seed=0).step == 6


def test_the_best_is_not_chosen_by_images_of_the_test_set(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(train.checkpoint, "save", lambda *args: saved.append(args[3]))
    config = small_config(epochs=1)
    config.data.watch_split = "test[:10%]"
    train.train_and_evaluate(config, tmp_path / "part of the test set")
    assert saved == [None]


def test_a_run_takes_the_steps_of_its_seed_its_epochs_and_its_schedule(tmp_path):
    overrides = {"seed": 3, "epochs": 2, "parallel": 1, "schedule": "cosine"}
    config = small_config(model="single_conv_5x5", **overrides, **{"data.watch_split": ""})
    train.train_and_evaluate(config, tmp_path / "run")
    data, model = datasets.load("digits", "train[:90]"), models.create("single_conv_5x5")
    tx = optim.create("adam", optax.cosine_decay_schedule(1e-3, 12))
    expected = state_lib.create(3, model, tx, (28, 28, 1))
    epoch = quick_jit(partial(steps.train_epoch, model=model, tx=tx))
    for number, row in enumerate(rundir.read_metrics(tmp_path / "run")):
        rows = jnp.asarray(batches.train_batches(3, number, 90, 16))
        expected, sums = epoch(expected, *map(jnp.asarray, data), rows)
        assert row["train_loss"] == pytest.approx(float(sums.loss_sum) / 90, rel=1e-4)


def compiled(**overrides):
    """A state, the data, what is compiled for them and six steps' examples."""
    config = small_config(**overrides)
    mesh = parallel.create_mesh(config)
    data = parts.load_data(config, mesh)
    model, tx = parts.create_model(config, 10), parts.create_optimizer(config, 90)
    state = parts.initial_state(config, model, tx, (28, 28, 1), mesh)
    programs = parts.compile_programs(config, model, tx, state, data, mesh)
    (piece,) = data.train.pieces(np.zeros((6, 1, 16), np.int32), 6)
    return state, data, programs, piece


def test_the_state_is_donated_to_the_next_piece():
    state, _, programs, piece = compiled()
    after, _ = programs.train(state, piece)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_the_device_does_not_wait_for_a_report(tmp_path, monkeypatch):
    compile_programs, advance = parts.compile_programs, report.advance
    events = []

    def noting(*args):
        programs = compile_programs(*args)

        def train_piece(state, piece):
            events.append("begun")
            return programs.train(state, piece)

        return programs._replace(train=train_piece)

    def noted(bar, position):
        events.append(int(position.count))
        advance(bar, position)

    monkeypatch.setattr(parts, "piece_length", lambda *_: 2)
    monkeypatch.setattr(parts, "compile_programs", noting)
    monkeypatch.setattr(report, "advance", noted)
    train.train_and_evaluate(small_config(epochs=1, name="in pieces"), tmp_path / "run")
    assert events == ["begun", "begun", 32, "begun", 64, 90]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_first_step_does_not_wait_for_what_scores(monkeypatch, on_cpu):
    monkeypatch.setattr(parts, "_on_cpu", lambda: on_cpu)
    trained, compile_scorer = threading.Event(), scoring.compile_scorer

    def later(*args):
        assert trained.wait(60)
        return compile_scorer(*args)

    monkeypatch.setattr(scoring, "compile_scorer", later)
    # By a name of its own, as what another test had compiled would be found again.
    state, data, programs, piece = compiled(name=f"scored later, {on_cpu}")
    # The state that the scorer would be compiled for is overwritten by then.
    state, _ = programs.train(state, piece)
    trained.set()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    assert programs.score_test(variables)["count"] == data.test.size


def test_scores_have_the_precision_that_holds_where_training_is_called(monkeypatch):
    compile_scorer, precisions = scoring.compile_scorer, []

    def noting(*args):
        precisions.append(jax.config.jax_default_matmul_precision)
        return compile_scorer(*args)

    monkeypatch.setattr(scoring, "compile_scorer", noting)
    with jax.default_matmul_precision("highest"):
        state, _, programs, _ = compiled(name="precise")
    programs.score_test(state_lib.variables(state))
    assert set(precisions) == {"highest"}


def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path, monkeypatch):
    compile_programs = parts.compile_programs

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return compile_programs(*args)

    monkeypatch.setattr(parts, "compile_programs", interrupted)
    with pytest.raises(signals.Stopped, match="SIGTERM before the first step"):
        train.train_and_evaluate(small_config(), tmp_path / "run")
    assert rundir.read_metrics(tmp_path / "run") == []


def test_a_learning_rate_too_high_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"diverged in epoch 1.*lower learning_rate than 1e\+30"):
        train.train_and_evaluate(small_config(learning_rate=1e30), tmp_path / "run")
    with pytest.raises(UserError, match="has no checkpoint: let it finish"):
        trained.load(tmp_path / "run")


def test_a_test_loss_that_is_not_finite_is_a_clear_error(tmp_path):
    # One step, whose loss is that of the initial weights and whose weights are still finite.
    overrides = {"learning_rate": 1e20, "batch_size": 90, "epochs": 1, "data.watch_split": ""}
    with pytest.raises(UserError, match=r"diverged in epoch 1: the test loss became NaN"):
        train.train_and_evaluate(small_config(**overrides), tmp_path / "run")
    assert trained.load(tmp_path / "run").step == 1


def test_a_damaged_newest_checkpoint_is_replaced_by_training_on(whole_run, tmp_path, monkeypatch):
    def stop(row, config):
        if row["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(report, "epoch", stop)
        with pytest.raises(signals.Stopped):
            train.train_and_evaluate(small_config(), tmp_path / "run")
    newest = tmp_path / "run/checkpoints/12/state"
    largest = max(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    os.truncate(largest, 100)
    with pytest.warns(UserWarning, match="checkpoint 12 is damaged and passed over"):
        train.train_and_evaluate(small_config(), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole_run[0])


def test_nothing_is_written_where_the_data_cannot_be_had(tmp_path, monkeypatch):
    def offline(*args):
        raise UserError("no network")

    monkeypatch.setattr(datasets, "load", offline)
    with pytest.raises(UserError, match="no network"):
        train.train_and_evaluate(small_config(), tmp_path / "runs/run")
    assert not (tmp_path / "runs").exists()


def test_streamed_data_gives_bit_for_bit_the_same_run(whole_run, tmp_path, monkeypatch):
    def stop(row, config):
        if row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    config = small_config(**{"data.loader": "stream"})
    expected = trained.load(whole_run[0]).evaluate("test")
    # Streaming is for data that does not fit.
    monkeypatch.setattr(environment, "free_memory", lambda: (0, None))
    with monkeypatch.context() as patch:
        patch.setattr(report, "epoch", stop)
        with pytest.raises(signals.Stopped):
            train.train_and_evaluate(config, tmp_path / "run")
    train.train_and_evaluate(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole_run[0])
    assert trained.load(tmp_path / "run").evaluate("test") == expected

    with pytest.raises(UserError, match=r"0.0 GiB free: train with data.loader=stream"):
        train.train_and_evaluate(small_config(), tmp_path / "resident")
    with pytest.raises(UserError, match=r"0.0 GiB free: train with data.loader=stream"):
        trained.load(whole_run[0]).evaluate("test")
    assert not (tmp_path / "resident").exists()


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="batch_size=91 is more than the 90 examples"):
        train.train_and_evaluate(small_config(batch_size=91), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"6,000,000,000 steps are more than can be counted"):
        train.train_and_evaluate(small_config(epochs=10**9), tmp_path / "run")


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match=r"a checkpoint takes 7\.8 MiB, and 1\.0 MiB are free"):
        train.train_and_evaluate(small_config(), tmp_path / "new/run")
    assert not (tmp_path / "new").exists()


def test_the_disk_that_must_have_room_is_that_of_the_checkpoints(tmp_path, monkeypatch):
    for folder in ("run", "disk"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")

    def usage(path):
        return SimpleNamespace(free=2**20 if Path(path).samefile(tmp_path / "disk") else 2**40)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(UserError, match=r"1\.0 MiB are free"):
        train.train_and_evaluate(small_config(), tmp_path / "run")
    # Before anything was trained.
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def piece_length(config, num_examples, most):
    return parts.piece_length(config, num_examples, most, parallel.single_mesh())


@pytest.mark.parametrize(
    ("steps", "every", "length"),
    [
        (47, 0, 47),
        (300, 0, 15),
        (469, 0, 67),
        (938, 0, 67),
        (110, 0, 10),
        (6750, 0, 375),
        (1009, 0, 50),
    ]
    + [(300, 10, 10), (300, 100, 20), (300, 7, 7), (300, 101, 101), (300, 999, 15), (47, 4, 4)],
)
def test_pieces_divide_an_epoch_where_they_can(steps, every, length):
    config = small_config(batch_size=10, **{"checkpoint.every_steps": every})
    assert piece_length(config, 10 * steps - 3, 10 * steps) == length


@pytest.mark.parametrize(
    ("steps", "seeds", "length"), [(300, 4, 3), (300, 100, 2), (10, 5, 10), (40, 30, 2), (1, 60, 1)]
)
def test_pieces_are_shorter_where_seeds_take_turns(steps, seeds, length):
    config = small_config(batch_size=10, num_seeds=seeds)
    assert piece_length(config, 10 * steps, 10**6) == length


@pytest.mark.parametrize(("steps", "length"), [(300, 300), (4999, 4999), (6750, 1125)])
def test_a_gpu_gets_an_epoch_as_one_program_where_it_is_short(steps, length, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert piece_length(small_config(batch_size=10), 10 * steps, 10 * steps) == length


def test_a_gpu_gets_an_epoch_of_streamed_data_in_pieces(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = small_config(batch_size=10, **{"data.loader": "stream"})
    assert piece_length(config, 3000, 10**6) == 15


@pytest.mark.parametrize(
    ("every", "most", "length"), [(0, 59, 5), (0, 110, 11), (0, 9, 1), (100, 79, 5), (7, 69, 1)]
)
def test_pieces_bring_no_more_than_may_be_brought(every, most, length):
    config = small_config(batch_size=10, **{"checkpoint.every_steps": every})
    assert piece_length(config, 3000, most) == length


def test_training_imports_what_it_uses(prepared, tmp_path):
    for split in ("train", "test"):
        datasets.load("digits", split)
    # A decoy that would be found first, as another package may only try the import.
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    code = (
        "import sys; from tests.test_train import small_config; from mnist_flax import "
        "train_and_evaluate, load; config = small_config(epochs=1, parallel=1); "
        f"train_and_evaluate(config, r'{tmp_path}/run'); load(r'{tmp_path}/run').evaluate(); "
        "assert not {'tensorflow', 'grain', 'requests', 'sklearn', 'h5py'} & set(sys.modules)"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    environment = os.environ | {"PYTHONPATH": path, "TFDS_DATA_DIR": str(prepared)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("loader", loaders.NAMES)
def test_the_folder_of_the_official_files_is_looked_into(loader, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    config = small_config(**{"data.name": "mnist", "data.loader": loader})
    config.data.manual_dir = str(tmp_path / "absent")
    with pytest.raises(UserError, match="absent does not exist"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_that_are_trained_and_tested_on_are_said(tmp_path, monkeypatch):
    def stop(*args):
        raise UserError("far enough")

    monkeypatch.setattr(parts, "create_model", stop)
    with (
        pytest.warns(UserWarning, match=r"train\[:90\] and train\[80:95\] share images: the test"),
        pytest.raises(UserError, match="far enough"),
    ):
        train.train_and_evaluate(
            small_config(**{"data.test_split": "train[80:95]"}), tmp_path / "run"
        )
