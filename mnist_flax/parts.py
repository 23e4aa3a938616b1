"""What a run needs before its first step: data, network, optimiser, state, compiled programs."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from mnist_flax import config as config_lib
from mnist_flax import (
    datasets,
    environment,
    epochs,
    loaders,
    models,
    optim,
    parallel,
    scoring,
    steps,
)
from mnist_flax import state as state_lib
from mnist_flax.errors import UserError
from mnist_flax.loaders import Loader, Piece
from mnist_flax.state import TrainState


class Data(NamedTuple):
    """The splits of a run; `watch` is None where none is watched, or `test` itself."""

    train: Loader
    watch: Loader | None
    test: Loader
    num_classes: int


class Programs(NamedTuple):
    """What a run compiles, beside the initial state; `length` is the steps of a piece."""

    length: int
    train: Callable[[TrainState, Piece], tuple[TrainState, steps.Metrics]]
    score_watch: Callable[[Any], dict[str, Any]] | None
    score_test: Callable[[Any], dict[str, Any]]


def load_data(config: ConfigDict, mesh: Mesh) -> Data:
    """The splits of a run as loaders for the mesh; equal splits share one.

    Raises:
        UserError: the data cannot be had, or does not fit into memory, or the splits' images
            differ in size.
    """
    data = config.data

    @cache
    def load(split: str) -> Loader:
        return loaders.create(data.loader, data.name, split, data.manual_dir, mesh)

    splits = filter(None, (data.train_split, data.watch_split, data.test_split))
    # Before the first is decoded, which may take minutes.
    datasets.prepare(data.name, splits, data.manual_dir)
    train, test = load(data.train_split), load(data.test_split)
    watch = load(data.watch_split) if data.watch_split else None
    if len({split.image_shape for split in (train, watch or test, test)}) > 1:
        raise UserError(
            f"the images of {data.name} differ in size from split to split: take splits of one size"
        )
    return Data(train, watch, test, datasets.num_classes(data.name))


def create_model(config: ConfigDict, num_classes: int) -> nn.Module:
    """The configured network."""
    dtype = jnp.dtype(config.compute_dtype)
    return models.create(config.model, num_classes=num_classes, dtype=dtype)


def create_optimizer(config: ConfigDict, num_examples: int) -> optax.GradientTransformation:
    """The configured optimiser, its schedule laid over the whole run."""
    total_steps = config.epochs * steps_per_epoch(config, num_examples)
    schedule = optim.create_schedule(config.schedule, config.learning_rate, total_steps)
    return optim.create(config.optimizer, schedule)


def abstract_state(
    config: ConfigDict,
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    mesh: Mesh,
) -> TrainState:
    """Shapes, dtypes and shardings of the state; with several seeds it has a leading axis of them.

    Raises:
        UserError: so many seeds take more memory than is free, or the images are too small for the
            network.
    """
    create, sharding = _creation(config, model, tx, image_shape, mesh)
    shape = (config.num_seeds,) if config.num_seeds > 1 else ()
    state = jax.eval_shape(create, jax.ShapeDtypeStruct(shape, np.uint32))
    if config.num_seeds > 1:
        _check_memory(config.num_seeds, state, mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


def initial_state(
    config: ConfigDict,
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    mesh: Mesh,
) -> TrainState:
    """The state before the first step, determined by `config.seed`, on every device.

    With several seeds they are dealt out to the devices.
    """
    create, sharding = _creation(config, model, tx, image_shape, mesh)
    seeds = np.array(config_lib.seeds(config), np.uint32)
    if config.num_seeds == 1:
        (seeds,) = seeds
    # Jitted, as Linen's initialisation run op by op compiles a program for each op; and barely
    # optimised on CPU, as it runs once: compiling it well takes two seconds longer.
    options = {"xla_backend_optimization_level": 0} if _on_cpu() else None
    return jax.jit(create, out_shardings=sharding, compiler_options=options)(seeds)


def _creation(
    config: ConfigDict,
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    mesh: Mesh,
) -> tuple[Callable[[Any], TrainState], NamedSharding]:
    """The function that makes the state of a seed, or of several, and the state's sharding."""
    create = partial(state_lib.create, model=model, tx=tx, image_shape=image_shape)
    if config.num_seeds == 1:
        return create, parallel.replicated_sharding(mesh)
    return jax.vmap(create), parallel.seeds_sharding(mesh)


def _check_memory(num_seeds: int, state: TrainState, mesh: Mesh) -> None:
    """Raises UserError if the state takes more memory than is free."""
    needed = state_lib.num_bytes(state)
    host, device = environment.free_memory()
    if device is None:
        # On CPU the copies of all devices that share a batch lie in one memory.
        needed, free = needed * mesh.shape[parallel.BATCH], host
    else:
        free = device * mesh.shape[parallel.SEEDS]
    if needed > free:
        raise UserError(
            f"{num_seeds:,} seeds need {needed / 2**30:.1f} GiB for weights and optimiser, and "
            f"{free / 2**30:.1f} GiB are free: set a lower num_seeds"
        )


def steps_per_epoch(config: ConfigDict, num_examples: int) -> int:
    """Steps that it takes to train on every example once."""
    return math.ceil(num_examples / config.batch_size)


def piece_length(config: ConfigDict, num_examples: int, most: int, mesh: Mesh) -> int:
    """The number of steps in one program; between programs the host may report, save or stop.

    A short epoch is one program. Otherwise a program has about a twentieth of the epoch's steps:
    more where the device would be idle between programs, fewer on CPU where the seeds of a device
    take turns. With streamed data it is a twentieth everywhere, as the next piece is read
    meanwhile. It takes at most `most` examples, but always a step. It divides
    `checkpoint.every_steps` where that is shorter than the epoch; otherwise it divides the epoch if
    a length up to three times as long does, since the remainder would be a second program to
    compile.
    """
    per_epoch, every = steps_per_epoch(config, num_examples), config.checkpoint.every_steps
    turns = config.num_seeds // mesh.shape[parallel.SEEDS] if _on_cpu() else 1
    # On GPU and TPU a step is too short to come back to the host every few.
    least = 10 if _on_cpu() or config.data.loader == "stream" else 1000
    # Not 1, of which XLA makes no loop.
    length = max(2, least // turns, per_epoch // (20 * turns))
    if per_epoch * turns <= 5 * least:
        length = per_epoch
    cap = max(1, most // (config.batch_size * config.num_seeds))
    length = min(length, cap, per_epoch)
    if 0 < every < per_epoch:
        divisors = [n for n in range(1, min(every, cap) + 1) if every % n == 0]
        return min(divisors, key=lambda n: max(n, length) / min(n, length))
    return next((n for n in range(length, min(3 * length, cap + 1)) if per_epoch % n == 0), length)


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

    The training program is ready when this returns. Those that score are waited for when they are
    first called; on CPU they are compiled meanwhile, elsewhere then.
    """
    size = data.train.size
    length = piece_length(config, size, data.train.max_examples, mesh)
    train = epochs.compile_epoch(
        partial(steps.train_epoch, model=model, tx=tx),
        mesh,
        state,
        data.train,
        config.batch_size,
        steps=steps_per_epoch(config, size),
        length=length,
        seeds=config.num_seeds,
        donate=True,
    )
    # Abstract, as the first step overwrites the state.
    variables = jax.eval_shape(state_lib.variables, state)
    pool = ThreadPoolExecutor()

    precision = jax.config.jax_default_matmul_precision

    def compile_scorer(loader: Loader) -> Callable[[Any], dict[str, Any]]:
        # What a context manager of the caller sets holds for its own thread.
        with jax.default_matmul_precision(precision):
            return scoring.compile_scorer(model, variables, loader, mesh, config.num_seeds)

    def scorer(loader: Loader) -> Callable[[Any], dict[str, Any]]:
        # Elsewhere when it is first called, as on GPU XLA chooses kernels by timing them.
        compiled = (
            pool.submit(compile_scorer, loader).result
            if _on_cpu()
            else cache(partial(compile_scorer, loader))
        )
        return lambda variables: compiled()(variables)

    score_test = scorer(data.test)
    score_watch = None
    if data.watch is not None:
        score_watch = score_test if data.watch is data.test else scorer(data.watch)
    pool.shutdown(wait=False)
    return Programs(length, train, score_watch, score_test)
