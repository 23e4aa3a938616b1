"""The training loop: when to train, score, report, save and stop."""

import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
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
    loaders,
    models,
    optim,
    parallel,
    report,
    rundir,
    scoring,
    signals,
    steps,
)
from mnist_flax import config as config_lib
from mnist_flax import state as state_lib
from mnist_flax.errors import UserError
from mnist_flax.loaders import Loader, Piece
from mnist_flax.state import TrainState


@dataclass
class Position:
    """Where a run stands beside its state; every checkpoint keeps it.

    Attributes:
        epoch: epochs finished.
        loss_sum, correct, count: training metrics of the epoch under way, summed over examples;
            arrays [seeds] where there are several.
        seconds: time spent training in the epoch under way.
        compile_seconds: time spent compiling the training program, over all starts of the run.
        wall_seconds: time of the whole run, over all its starts.
    """

    epoch: int = 0
    loss_sum: float | np.ndarray = 0.0
    correct: int | np.ndarray = 0
    count: int | np.ndarray = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    wall_seconds: float = 0.0

    def add(self, metrics: steps.Metrics, seconds: float) -> None:
        self.loss_sum = self.loss_sum + np.asarray(metrics.loss_sum, np.float64)
        self.correct = self.correct + np.asarray(metrics.correct, np.int64)
        self.count = self.count + np.asarray(metrics.count, np.int64)
        self.seconds += seconds

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, and `Position(**record)` takes up."""
        return {key: np.asarray(value).tolist() for key, value in asdict(self).items()}

    def next_epoch(self) -> None:
        self.epoch += 1
        self.loss_sum, self.correct, self.count, self.seconds = 0.0, 0, 0, 0.0


class Data(NamedTuple):
    """The splits of a run; `watch` is None where none is watched, or `test` itself."""

    train: Loader
    watch: Loader | None
    test: Loader
    num_classes: int


class Programs(NamedTuple):
    """What a run compiles, beside the initial state."""

    train: Callable[[TrainState, Piece], tuple[TrainState, steps.Metrics]]
    score_watch: Callable[[Any], dict[str, Any]] | None
    score_test: Callable[[Any], dict[str, Any]]


def train_and_evaluate(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains a network as configured, scores it on the test split and leaves a run folder.

    Called again on the same folder it resumes after the newest checkpoint, giving bit for bit
    the parameters of a run that was never stopped, on as many devices of the same kind; for a
    finished run it returns the summary.

    Args:
        config: as `config.default()`, which says what each key means.
        workdir: the run folder: new, empty, or of a run of the same configuration.

    Returns:
        The contents of summary.json.

    Raises:
        UserError: what was given cannot be run, or training diverged.
        signals.Stopped: SIGINT or SIGTERM arrived; what was trained is saved.
    """
    began = time.perf_counter()
    run_dir = Path(workdir)
    config_lib.validate(config)
    rundir.check(run_dir, config)
    if summary := rundir.read_summary(run_dir):
        report.finished_before(run_dir)
        report.result(summary, run_dir)
        return summary

    mesh = parallel.mesh(config)
    data = load_data(config, mesh)
    if config.batch_size > data.train.size:
        raise UserError(
            f"batch_size={config.batch_size} is more than the {data.train.size} examples "
            f"of {config.data.train_split}: use at most that many"
        )
    image_shape = data.train.image_shape
    model = create_model(config, data.num_classes)
    tx = create_optimizer(config, data.train.size)
    state = initial_state(config, model, tx, image_shape, mesh)
    parameters = state_lib.count_parameters(state.params) // config.num_seeds

    rundir.create(run_dir, config)
    device = environment.device_name()
    report.header(config, parameters, data, run_dir, device)

    # Choosing the best by images of the test set would make its score a lie.
    keep_best = data.watch is not None and not datasets.overlap(
        config.data.name, config.data.watch_split, config.data.test_split
    )
    constants = {
        "image_shape": image_shape,
        "num_classes": data.num_classes,
        "config": config.to_dict(),
        "versions": environment.versions(),
        "devices_a_batch": mesh.shape[parallel.AXIS],
    }
    # Signals outside, so that one that arrives while the last checkpoint is written waits.
    with (
        signals.noted() as received,
        checkpoint.open_manager(rundir.checkpoints(run_dir)) as manager,
    ):
        position = Position()
        check_finite = partial(_check_finite, config, manager)
        if restored := checkpoint.restore(manager, lambda record: state):
            state, record = restored
            position = Position(**record["position"])
            report.resuming(state_lib.updates(state), position.epoch, config.epochs)
            _check_devices(record.get("devices_a_batch"), constants["devices_a_batch"])
        rundir.start_metrics(run_dir, state_lib.updates(state))
        earlier = position.wall_seconds

        clock = time.perf_counter()
        programs = compile_programs(config, model, tx, state, data, mesh)
        position.compile_seconds += time.perf_counter() - clock

        while position.epoch < config.epochs and not received:
            pieces = _train_pieces(config, data, programs, state, position, received)
            images = data.train.size * config.num_seeds
            with report.progress(position, config.epochs, images) as bar:
                for state in pieces:  # noqa: B007 - it is used after the loop
                    check_finite("the loss", [position.loss_sum], position)
                    report.advance(bar, position)
            # The last update may have broken what the last loss does not show yet.
            check_finite("a parameter", jax.tree.leaves(state.params), position)
            watch_accuracy = None
            if np.sum(position.count) == images:
                row = _epoch_row(config, programs, state, position)
                if data.watch is not None:
                    losses = [each["watch_loss"] for each in row.get("seeds", [row])]
                    check_finite("the watched loss", [losses], position)
                rundir.append_metrics(run_dir, row)
                report.epoch(row, config)
                watch_accuracy = row["watch_accuracy"] if keep_best else None
                position.next_epoch()
            position.wall_seconds = earlier + time.perf_counter() - began
            checkpoint.save(
                manager, state, constants | {"position": position.record()}, watch_accuracy
            )
    if received:
        raise signals.Stopped(received[0], saved=state_lib.updates(state) > 0)

    score = programs.score_test(state_lib.variables(state))
    check_finite("the test loss", [score["loss"]], position)
    images = data.train.size * config.num_seeds
    rows = rundir.read_metrics(run_dir)
    seconds = sum(row["seconds"] for row in rows)
    summary = {
        "config_name": config.name,
        "dataset": config.data.name,
        "model": config.model,
        "parameters": parameters,
        "train_examples": data.train.size,
        "test_examples": score["count"],
        "epochs": config.epochs,
        "seed": config.seed,
        **_over_seeds(config, {f"test_{key}": score[key] for key in ("loss", "accuracy")}),
        "wall_seconds": earlier + time.perf_counter() - began,
        "compile_seconds": position.compile_seconds,
        # None where the lines of all epochs were deleted.
        "images_per_second": len(rows) * images / seconds if rows else None,
        "device": device,
        "versions": constants["versions"],
    }
    if config.num_seeds > 1:
        summary |= {
            "test_accuracy_deviation": statistics.stdev(score["accuracy"]),
            "test_accuracy_min": min(score["accuracy"]),
            "test_accuracy_max": max(score["accuracy"]),
        }
    rundir.write_summary(run_dir, summary)
    report.result(summary, run_dir)
    return summary


def load_data(config: ConfigDict, mesh: Mesh) -> Data:
    """The splits of a run, on every device of the mesh; equal splits share one.

    Raises:
        UserError: the data cannot be had, or does not fit into memory.
    """
    data = config.data

    def load(split: str) -> Loader:
        return loaders.create(data.loader, data.name, split, data.manual_dir, mesh)

    test = load(data.test_split)
    watch = None
    if data.watch_split == data.test_split:
        watch = test
    elif data.watch_split:
        watch = load(data.watch_split)
    num_classes = datasets.num_classes(data.name)
    return Data(load(data.train_split), watch, test, num_classes)


def create_model(config: ConfigDict, num_classes: int) -> nn.Module:
    """The configured network."""
    dtype = jnp.dtype(config.compute_dtype)
    return models.create(config.model, num_classes=num_classes, dtype=dtype)


def create_optimizer(config: ConfigDict, num_examples: int) -> optax.GradientTransformation:
    """The configured optimiser, its schedule laid over the whole run."""
    total_steps = config.epochs * steps_per_epoch(config, num_examples)
    schedule = optim.create_schedule(config.schedule, config.learning_rate, total_steps)
    return optim.create(config.optimizer, schedule)


def initial_state(
    config: ConfigDict,
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    mesh: Mesh,
) -> TrainState:
    """The state before the first step, determined by `config.seed`, on every device.

    With several seeds it has a leading axis of seeds, dealt out to the devices.

    Raises:
        UserError: so many seeds take more memory than is free.
    """
    create = partial(state_lib.create, model=model, tx=tx, image_shape=image_shape)
    seeds, sharding = np.uint32(config.seed), parallel.replicated(mesh)
    if config.num_seeds > 1:
        create, sharding = jax.vmap(create), parallel.dealt_out(mesh)
        abstract = jax.ShapeDtypeStruct((config.num_seeds,), np.uint32)
        _check_memory(config.num_seeds, jax.eval_shape(create, abstract), mesh)
        seeds = np.array(seeds_of(config), np.uint32)
    # Jitted, as Linen's initialisation run op by op compiles a program for each op; and barely
    # optimised on CPU, as it runs once: compiling it well takes two seconds longer.
    options = {"xla_backend_optimization_level": 0} if _on_cpu() else None
    return jax.jit(create, out_shardings=sharding, compiler_options=options)(seeds)


def _check_memory(num_seeds: int, states: TrainState, mesh: Mesh) -> None:
    """Raises UserError if the states of so many seeds take more memory than is free."""
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))
    host, device = environment.free_memory()
    free = host if device is None else device * mesh.shape[parallel.SEEDS]
    if needed > free:
        raise UserError(
            f"{num_seeds:,} seeds need {needed / 2**30:.1f} GiB for weights and optimiser, and "
            f"{free / 2**30:.1f} GiB are free: set a lower num_seeds"
        )


def seeds_of(config: ConfigDict) -> range:
    """The seeds that a run trains with."""
    return range(config.seed, config.seed + config.num_seeds)


def steps_per_epoch(config: ConfigDict, num_examples: int) -> int:
    """Steps that it takes to train on every example once."""
    return math.ceil(num_examples / config.batch_size)


def piece_length(config: ConfigDict, num_examples: int, most: int) -> int:
    """Steps that run as one program, between which the host may report, save or stop.

    About a twentieth of an epoch, where that takes the device a while, and no more than bring
    `most` examples where one step does not. A length that divides the epoch is preferred, since
    the remainder would be a second program to compile; one that divides `checkpoint.every_steps`
    is taken in any case.
    """
    steps, every = steps_per_epoch(config, num_examples), config.checkpoint.every_steps
    # On GPU and TPU a step is too short to come back to the host every few.
    least = 10 if _on_cpu() else 1000
    length = steps if steps <= 5 * least else max(least, steps // 20)
    cap = max(1, most // (config.batch_size * config.num_seeds))
    length = min(length, cap)
    if 0 < every < steps:
        divisors = [n for n in range(1, min(every, cap) + 1) if every % n == 0]
        return min(divisors, key=lambda n: max(n, length) / min(n, length))
    return next((n for n in range(length, min(2 * length, cap + 1)) if steps % n == 0), length)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def compile_programs(
    config: ConfigDict,
    model: nn.Module,
    tx: optax.GradientTransformation,
    state: TrainState,
    data: Data,
    mesh: Mesh,
) -> Programs:
    """Compiles everything that a run executes on the devices.

    The training program is ready when this returns; those that score are compiled meanwhile and
    waited for when they are first called.
    """
    size = data.train.size
    train = epochs.compile_epoch(
        partial(steps.train_epoch, model=model, tx=tx),
        mesh,
        state,
        data.train,
        config.batch_size,
        steps=steps_per_epoch(config, size),
        length=piece_length(config, size, data.train.most),
        seeds=config.num_seeds,
        donate=True,
    )
    # Abstract, as the first step overwrites the state.
    variables = jax.eval_shape(state_lib.variables, state)
    pool = ThreadPoolExecutor()

    def scorer(loader: Loader) -> Callable[[Any], dict[str, Any]]:
        compiled = pool.submit(
            scoring.compile_scorer, model, variables, loader, mesh, config.num_seeds
        )
        return lambda variables: compiled.result()(variables)

    score_test = scorer(data.test)
    score_watch = None
    if data.watch is not None:
        score_watch = score_test if data.watch is data.test else scorer(data.watch)
    pool.shutdown(wait=False)
    return Programs(train, score_watch, score_test)


def _train_pieces(
    config: ConfigDict,
    data: Data,
    programs: Programs,
    state: TrainState,
    position: Position,
    received: list[int],
) -> Iterator[TrainState]:
    """Trains on to the end of the epoch, or to where a checkpoint is due or a signal is received.

    Yields once for each piece, when `position` has its metrics. By then the device is at the next
    one, so that it does not wait for the host; what is yielded last is the state of `position`.
    """
    num_examples = data.train.size
    rows = np.stack(
        [
            batches.train_batches(seed, position.epoch, num_examples, config.batch_size)
            for seed in seeds_of(config)
        ],
        axis=1,
    )
    length = piece_length(config, num_examples, data.train.most)
    every = config.checkpoint.every_steps
    done = state_lib.updates(state) - position.epoch * len(rows)
    stop = done - done % every + every if every else len(rows)

    def pieces() -> Iterator[Piece]:
        for piece in data.train.pieces(rows[done:stop], length):
            yield piece
            if received:
                return

    clock = time.perf_counter()
    for after, metrics in epochs.run_pieces(programs.train, state, pieces()):
        now = time.perf_counter()
        position.add(metrics, now - clock)
        yield after
        clock = now


def _epoch_row(
    config: ConfigDict, programs: Programs, state: TrainState, position: Position
) -> dict[str, Any]:
    """The row of a finished epoch in metrics.jsonl."""
    train = scoring.averages(position)
    watch = programs.score_watch(state_lib.variables(state)) if programs.score_watch else {}
    scores = {
        "train_loss": train["loss"],
        "train_accuracy": train["accuracy"],
        "watch_loss": watch.get("loss"),
        "watch_accuracy": watch.get("accuracy"),
    }
    return {
        "epoch": position.epoch + 1,
        "step": state_lib.updates(state),
        **_over_seeds(config, scores),
        "images_per_second": float(np.sum(position.count)) / position.seconds,
        "seconds": position.seconds,
    }


def _over_seeds(config: ConfigDict, scores: dict[str, Any]) -> dict[str, Any]:
    """The scores; of several seeds their means, and under "seeds" each seed's own."""
    if config.num_seeds == 1:
        return scores
    means = {key: value and statistics.fmean(value) for key, value in scores.items()}
    each = [
        {"seed": seed} | {key: value and value[i] for key, value in scores.items()}
        for i, seed in enumerate(seeds_of(config))
    ]
    return means | {"seeds": each}


def _check_devices(before: int | None, now: int) -> None:
    """Warns where a resumed run has not as many devices a batch as it had."""
    if before not in (None, now):
        warnings.warn(
            f"devices a batch: {before} before, {now} now; each draws its own dropout, so that the "
            "result is not bit for bit that of a run that was never stopped",
            stacklevel=2,
        )


def _check_finite(
    config: ConfigDict,
    manager: Any,
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
            what += f" of seed {seeds_of(config)[int(by_seed.argmin())]}"
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
