"""The training loop: when to train, score, report, save and stop."""

import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mnist_flax import (
    batches,
    checkpoint,
    datasets,
    environment,
    epochs,
    files,
    optim,
    parallel,
    parts,
    report,
    results,
    rundir,
    signals,
)
from mnist_flax import config as config_lib
from mnist_flax import state as state_lib
from mnist_flax.errors import UserError
from mnist_flax.loaders import Piece
from mnist_flax.position import Position
from mnist_flax.state import TrainState


def train_and_evaluate(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains a network as configured, scores it on the test split and leaves a run folder.

    Called again on the same folder it resumes after the newest checkpoint; on CPU with as many
    devices that gives bit for bit the parameters of a run that was never stopped. For a finished
    run it returns the summary. On CPU each core becomes a device only if this is called before
    JAX's first computation. It may set the environment variable NPROC, also for the processes
    started from this one: to 1 where several cores become devices before JAX 0.11, so that each has
    one thread, otherwise to the cores that a container may use, if the machine has more.

    Args:
        config: as `config.default()`, which says what each key means.
        workdir: the run folder: new, empty, or of a run of the same configuration.

    Returns:
        The contents of summary.json.

    Raises:
        UserError: what was given cannot be run, or training diverged; another process trains in
            the folder, it cannot be written, or its disk has no room for a checkpoint.
        signals.Stopped: SIGINT, SIGTERM or SIGHUP arrived; what was trained is saved.
    """
    began = time.perf_counter()
    run_dir = files.local(workdir)
    config_lib.validate(config)
    rundir.check(run_dir, config)
    if summary := _finished(run_dir):
        return summary

    # Asked in this order, as counting the processes starts JAX.
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise UserError(
            f"a run has one process, and here are {jax.process_count()}: for several write a loop "
            "with mnist_flax.steps, epochs and loaders, which take any devices"
        )
    mesh = parallel.create_mesh(config)
    data = parts.load_data(config, mesh)
    if config.batch_size > data.train.size:
        raise UserError(
            f"batch_size={config.batch_size} is more than the {data.train.size} examples "
            f"of {config.data.train_split}: use at most that many"
        )
    if (total := config.epochs * parts.steps_per_epoch(config, data.train.size)) >= 2**31:
        raise UserError(f"{total:,} steps are more than can be counted (2**31): set fewer epochs")
    if datasets.overlap(config.data.name, config.data.train_split, config.data.test_split):
        warnings.warn(
            f"{config.data.train_split} and {config.data.test_split} share images: the test "
            "accuracy will say nothing of new ones",
            stacklevel=2,
        )
    model = parts.create_model(config, data.num_classes)
    tx = parts.create_optimizer(config, data.train.size)
    abstract = parts.abstract_state(config, model, tx, data.train.image_shape, mesh)
    checkpoint.check_room(rundir.nearest_existing(rundir.checkpoints(run_dir)), abstract)
    with rundir.locked(run_dir, config):
        # Another process may have finished it meanwhile.
        return _finished(run_dir) or _train_and_score(
            config, run_dir, data, model, tx, abstract, mesh, began
        )


def _finished(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a finished run, shown to the user."""
    if summary := rundir.read_summary(run_dir):
        report.finished_before(run_dir)
        report.result(summary, run_dir)
    return summary


def _train_and_score(
    config: ConfigDict,
    run_dir: Path,
    data: parts.Data,
    model: nn.Module,
    tx: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh,
    began: float,
) -> dict[str, Any]:
    """`train_and_evaluate` from the initial state on, in a folder that is locked."""
    parameters = state_lib.count_parameters(abstract.params) // config.num_seeds
    report.header(config, parameters, data, run_dir, environment.device_name(mesh.size))

    # Choosing the best by images of the test set would make its score a lie.
    keep_best = data.watch is not None and not datasets.overlap(
        config.data.name, config.data.watch_split, config.data.test_split
    )
    constants = {
        "train_examples": data.train.size,
        # As JSON gives it back.
        "image_shape": list(data.train.image_shape),
        "num_classes": data.num_classes,
        "config": config.to_dict(),
        "versions": environment.versions(),
    }
    # Signals outside, so that one that arrives while the last checkpoint is written waits.
    with (
        signals.noted() as received,
        checkpoint.open_manager(rundir.checkpoints(run_dir)) as manager,
    ):
        restored = _restore(config, run_dir, manager, abstract, constants)
        state, position = restored or (None, Position())
        if state is None or state_lib.num_updates(state) == 0:
            start = parts.initial_state(config, model, tx, data.train.image_shape, mesh)
            # Of a network from a Keras file the parameters alone count.
            state = start.replace(params=state.params) if state else start
        # Not before the data are known to be those of the checkpoint.
        rundir.write_config(run_dir, config)
        rundir.start_metrics(run_dir, state_lib.num_updates(state))
        earlier = position.wall_seconds

        clock = time.perf_counter()
        programs = parts.compile_programs(config, model, tx, state, data, mesh)
        compile_seconds = position.compile_seconds + time.perf_counter() - clock
        position = replace(position, compile_seconds=compile_seconds)

        while position.epoch < config.epochs and not received:
            state, position = _train_pieces(
                config, data, programs, manager, state, position, received
            )
            # The last update may have broken what the last loss does not show yet.
            _check_finite(config, manager, "a parameter", jax.tree.leaves(state.params), position)
            row, watch_accuracy = None, None
            if np.sum(position.count) == data.train.size * config.num_seeds:
                row = _score_epoch(config, programs, manager, state, position)
                rundir.append_metrics(run_dir, row)
                watch_accuracy = row["watch_accuracy"] if keep_best else None
                position = position.next_epoch()
            position = replace(position, wall_seconds=earlier + time.perf_counter() - began)
            checkpoint.save(
                manager, state, constants | {"position": position.record()}, watch_accuracy
            )
            # Not before it is saved, as the reader of the output may have gone.
            if row is not None:
                report.epoch(row, config)
    if received:
        raise signals.Stopped(received[0], saved=state_lib.num_updates(state) > 0)

    score = programs.score_test(state_lib.variables(state))
    _check_finite(config, manager, "the test loss", [score["loss"]], position)
    position = replace(position, wall_seconds=earlier + time.perf_counter() - began)
    rows = rundir.read_metrics(run_dir)
    summary = results.summary(config, data.train.size, parameters, score, position, rows, mesh.size)
    rundir.write_summary(run_dir, summary)
    report.result(summary, run_dir)
    return summary


def _restore(
    config: ConfigDict,
    run_dir: Path,
    manager: checkpoint.Manager,
    abstract: TrainState,
    constants: dict[str, Any],
) -> tuple[TrainState, Position] | None:
    """State and position of the newest sound checkpoint; None where there is none."""

    def abstract_state_of(record: dict[str, Any]) -> TrainState:
        _check_data(config, record, constants)
        rundir.check_trained(run_dir, record, config)
        before = record["config"]["optimizer"]
        if before == config.optimizer:
            return abstract
        # A network from a Keras file, with whose optimiser nothing was trained.
        init = optim.without_schedule(before).init
        return abstract.replace(opt_state=jax.eval_shape(init, abstract.params))

    restored = checkpoint.restore(manager, abstract_state_of)
    if restored is None:
        return None
    state, record = restored
    position = Position(**record["position"])
    checkpoint.put_aside(manager, state_lib.num_updates(state))
    report.resuming(state_lib.num_updates(state), position.epoch, config.epochs)
    return state, position


def _train_pieces(
    config: ConfigDict,
    data: parts.Data,
    programs: parts.Programs,
    manager: checkpoint.Manager,
    state: TrainState,
    position: Position,
    received: list[int],
) -> tuple[TrainState, Position]:
    """Trains to the end of the epoch, or to where a checkpoint is due or a signal is received."""
    num_examples = data.train.size
    rows = np.stack(
        [
            batches.train_batches(seed, position.epoch, num_examples, config.batch_size)
            for seed in config_lib.seeds(config)
        ],
        axis=1,
    )
    every = config.checkpoint.every_steps
    done = state_lib.num_updates(state) - position.epoch * len(rows)
    stop = done - done % every + every if every else len(rows)

    def pieces() -> Iterator[Piece]:
        for piece in data.train.pieces(rows[done:stop], programs.length):
            yield piece
            if received:
                return

    with report.progress(position, config.epochs, num_examples * config.num_seeds) as bar:
        clock = time.perf_counter()
        for newest, metrics in epochs.run_pieces(programs.train, state, pieces()):
            state, now = newest, time.perf_counter()
            position = position.after(metrics, now - clock)
            _check_finite(config, manager, "the loss", [position.loss_sum], position)
            report.advance(bar, position)
            clock = now
    return state, position


def _score_epoch(
    config: ConfigDict,
    programs: parts.Programs,
    manager: checkpoint.Manager,
    state: TrainState,
    position: Position,
) -> dict[str, Any]:
    """The row of a finished epoch in metrics.jsonl, with the score of the watched split."""
    watch = {}
    if programs.score_watch:
        watch = programs.score_watch(state_lib.variables(state))
        _check_finite(config, manager, "the watched loss", [watch["loss"]], position)
    return results.epoch_row(config, position, state_lib.num_updates(state), watch)


def _check_data(config: ConfigDict, record: dict[str, Any], constants: dict[str, Any]) -> None:
    """Raises UserError where the data set is another than the checkpoint was trained on."""
    for kind in ("train_examples", "image_shape", "num_classes"):
        now = constants[kind]
        # A network from a Keras file has no examples yet.
        before = record.get(kind, now)
        if before != now:
            raise UserError(
                f"{config.data.name} is not the data set that this run was trained on: {kind} was "
                f"{before} and is {now}; prepare that one, or train in a new run folder"
            )


def _check_finite(
    config: ConfigDict,
    manager: checkpoint.Manager,
    what: str,
    arrays: list[Any],
    position: Position,
) -> None:
    """Raises UserError if a number is NaN or infinite; of several seeds it says which."""
    for array in arrays:
        finite = np.isfinite(array)
        if finite.all():
            continue
        if config.num_seeds > 1:
            by_seed = finite.reshape(config.num_seeds, -1).all(axis=1)
            what += f" of seed {config_lib.seeds(config)[int(by_seed.argmin())]}"
        epoch = min(position.epoch + 1, config.epochs)
        saved = manager.latest_step()
        kept = (
            f"the checkpoint of step {saved:,} is kept"
            if saved is not None
            else "there is no checkpoint yet"
        )
        raise UserError(
            f"training diverged in epoch {epoch}: {what} became NaN or infinite "
            f"({kept}); try a lower learning_rate than {config.learning_rate:g} in a new run folder"
        )
