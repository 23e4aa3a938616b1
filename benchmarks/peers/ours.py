"""This package, as `python -m mnist_flax.main` runs it: pieces of an epoch as one program."""

import time
from itertools import count

import jax

from benchmarks import recipes
from benchmarks.peers import PROBE, Data, Job, Peer, jax_memory
from mnist_flax import datasets, epochs, loaders, parallel, parts, state


def create(job: Job, data: Data, variant: str) -> Peer:
    config = recipes.config(job.network)
    config.compute_dtype = job.dtype
    mesh = parallel.create_mesh(config)
    arrays = loaders.Resident(datasets.Arrays(data.images, data.labels), mesh)
    probe = loaders.Resident(datasets.Arrays(data.images[PROBE], data.labels[PROBE]), mesh)
    # Scored on the probe only, so that nothing else is compiled.
    splits = parts.Data(train=arrays, watch=None, test=probe, num_classes=10)
    model = parts.create_model(config, splits.num_classes)
    tx = parts.create_optimizer(config, arrays.size)
    current = parts.initial_state(config, model, tx, arrays.image_shape, mesh)
    parameters = state.count_parameters(current.params)
    programs = parts.compile_programs(config, model, tx, current, splits, mesh)

    length = programs.length
    # Without the remainder, which has fewer steps.
    rows = data.rows[: len(data.rows) // length * length, None]
    pieces = list(arrays.pieces(rows, length))
    turn = count()

    def run(least: int) -> tuple[int, float]:
        nonlocal current
        calls = -(-least // length)
        clock = time.perf_counter()
        these = (pieces[next(turn) % len(pieces)] for _ in range(calls))
        for newest, _ in epochs.run_pieces(programs.train, current, these):
            current = newest
        jax.block_until_ready(current)
        return calls * length, time.perf_counter() - clock

    def loss() -> float:
        return programs.score_test(state.variables(current))["loss"]

    return Peer(parameters, run, loss, jax_memory)
