"""A process of several that train together: `python -m tests.process PORT COUNT INDEX RUN_DIR`."""

import sys
import zlib
from functools import partial

import jax
import numpy as np

from mnist_flax import (
    batches,
    decoding,
    epochs,
    loaders,
    parallel,
    parts,
    scoring,
    steps,
    trained,
)
from mnist_flax import config as config_lib
from mnist_flax import state as state_lib
from mnist_flax.errors import UserError


def train_on_two_devices(loader_name: str) -> tuple[int, float, int]:
    """The checksum of a trained state, its loss, and the number of examples read."""
    config = config_lib.default()
    config.model, config.batch_size, config.parallel = "baseline", 35, 2
    mesh = parallel.create_mesh(config)
    loader = loaders.create(loader_name, "digits", "train[:90]", "", mesh)
    model, tx = parts.create_model(config, 10), parts.create_optimizer(config, 90)
    state = parts.initial_state(config, model, tx, loader.image_shape, mesh)
    epoch = partial(steps.train_epoch, model=model, tx=tx)
    epoch = epochs.compile_epoch(epoch, mesh, state, loader, 35, steps=3, length=3)

    indices, read = [], decoding.Examples.read
    decoding.Examples.read = lambda self, some: indices.extend(some) or read(self, some)
    (piece,) = loader.pieces(batches.train_batches(0, 0, 90, 35)[:, None], 3)
    decoding.Examples.read = read
    state, metrics = epoch(state, piece)
    leaves = jax.tree.leaves(jax.device_get(state))
    crc32 = zlib.crc32(b"".join(np.asarray(leaf).tobytes() for leaf in leaves))
    return crc32, float(metrics.loss_sum), len(indices)


def train_two_seeds_on_two_devices() -> list[float]:
    """Each seed's loss, and its score by the test split."""
    config = config_lib.default()
    config.model, config.batch_size, config.parallel, config.num_seeds = "baseline", 30, 2, 2
    mesh = parallel.create_mesh(config)
    train = loaders.create("resident", "digits", "train[:90]", "", mesh)
    test = loaders.create("resident", "digits", "test", "", mesh)
    model, tx = parts.create_model(config, 10), parts.create_optimizer(config, 90)
    state = parts.initial_state(config, model, tx, train.image_shape, mesh)
    epoch = partial(steps.train_epoch, model=model, tx=tx)
    epoch = epochs.compile_epoch(epoch, mesh, state, train, 30, steps=3, length=3, seeds=2)
    rows = np.stack([batches.train_batches(seed, 0, 90, 30) for seed in (0, 1)], axis=1)
    ((state, metrics),) = epochs.run_pieces(epoch, state, train.pieces(rows, 3))
    variables = state_lib.variables(state)
    score = scoring.compile_scorer(model, variables, test, mesh, seeds=2)(variables)
    return [*metrics.loss_sum.tolist(), *score["loss"], *score["accuracy"]]


def score_run(run_dir: str) -> list[float]:
    """The score of a run, and the probabilities of an empty image."""
    run = trained.load(run_dir)
    return [run.evaluate()["loss"], *run.predict(np.zeros((1, 28, 28), np.uint8))[0].tolist()]


if __name__ == "__main__":
    port, count, index = map(int, sys.argv[1:4])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    for name in loaders.NAMES:
        print("trained", *train_on_two_devices(name))
    print("seeds", *train_two_seeds_on_two_devices())
    # One process alone, for which no other waits.
    if index == 1:
        print("run", *score_run(sys.argv[4]))
    config = config_lib.default()
    config.parallel = 1
    try:
        print("mesh", parallel.create_mesh(config).size)
    except UserError as error:
        print("mesh", error)
