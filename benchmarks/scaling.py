"""Images a second and memory against batch size, size of the data set and width of the network.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --network convnet --device gpu

Each point is a process of its own that trains on random MNIST-shaped images; the points take
turns. What does not vary is the recipe's batch size, 60,000 images and the network's own width.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks import hardware, recipes, suite, worker
from benchmarks.peers import jax_memory
from mnist_flax import batches, cli, datasets, epochs, loaders, models, parallel, parts
from mnist_flax import state as state_lib
from mnist_flax.errors import UserError

AXES = {
    "batch_size": (8, 32, 128, 512, 2048),
    "examples": (6_000, 60_000, 240_000),
    "width": (0.5, 1, 2, 4),
}


def main(argv: list[str] | None = None) -> None:
    parser = suite.parser("scaling", __doc__, repetitions=3, seconds=3)
    parser.add_argument("--network", choices=models.names(), default="convnet")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.point is not None:
        print(json.dumps(measure(args.network, args.seconds, **args.point)))
        return

    if not isinstance(models.create(args.network), models.CNN):
        raise UserError(f"{args.network} has no width: choose another network")
    suite.check_installed(("the plot", "matplotlib"))
    origin = hardware.origin(args.device)
    usual = {
        "batch_size": recipes.config(args.network).batch_size,
        "examples": 60_000,
        "width": 1,
    }
    points = [{axis: value} for axis, values in AXES.items() for value in values]
    measured = [[] for _ in points]
    for repetition in range(args.repetitions):
        for point, runs in zip(points, measured, strict=True):
            runs.append(run(args.network, args.device, args.seconds, usual | point))
            speed, done = runs[-1]["images_per_second"], f"{repetition + 1}/{args.repetitions}"
            print(f"{done} {point}: {speed:,.0f} images/s", flush=True)
        result = {
            "network": args.network,
            "usual": usual,
            **origin,
            "points": [
                {"point": point, "runs": runs} for point, runs in zip(points, measured, strict=True)
            ],
        }
        file = args.results / f"scaling_{args.device}.json"
        suite.write(result, file, table(result))
        plot(result, file.with_suffix(".png"))


def run(network: str, device: str, seconds: float, point: dict) -> dict[str, float]:
    """Measures one point in a process of its own; what `point` lacks is the recipe's."""
    flags = [f"--network={network}", f"--seconds={seconds}", f"--point={json.dumps(point)}"]
    return suite.child("scaling", device, *flags)


def measure(
    network: str,
    seconds: float,
    batch_size: int | None = None,
    examples: int = 60_000,
    width: float = 1,
    num_seeds: int = 1,
    compute_dtype: str = "float32",
) -> dict[str, float]:
    """Trains for at least `seconds` seconds in this process; images/s are those of all seeds."""
    rng = np.random.default_rng(0)
    config = recipes.config(network)
    config.batch_size, config.num_seeds = batch_size or config.batch_size, num_seeds
    config.compute_dtype = compute_dtype
    # A short batch takes as long as a full one.
    examples -= examples % config.batch_size
    images = rng.integers(0, 256, (examples, 28, 28, 1), np.uint8)
    labels = rng.integers(0, 10, examples, np.int32)
    model = parts.create_model(config, 10)
    if width != 1:
        model = model.clone(
            convs=tuple((round(width * features), *rest) for features, *rest in model.convs),
            dense=tuple(round(width * features) for features in model.dense),
        )
    tx = parts.create_optimizer(config, examples)
    mesh = parallel.create_mesh(config)
    data = loaders.Resident(datasets.Arrays(images, labels), mesh)
    probe = loaders.Resident(datasets.Arrays(images[:500], labels[:500]), mesh)
    splits = parts.Data(data, watch=None, test=probe, num_classes=10)
    state = parts.initial_state(config, model, tx, data.image_shape, mesh)
    programs = parts.compile_programs(config, model, tx, state, splits, mesh)
    # Waits for what would be compiled beside the training.
    programs.score_test(state_lib.variables(state))

    length = programs.length
    rows = batches.train_batches(0, 0, examples, config.batch_size)
    rows = np.repeat(rows[:, None], num_seeds, axis=1)
    pieces = list(data.pieces(rows[: len(rows) // length * length], length))
    state, _ = jax.block_until_ready(programs.train(state, pieces[0]))

    def turns() -> Iterator[loaders.Piece]:
        until = time.perf_counter() + seconds
        for piece in itertools.cycle(pieces):
            yield piece
            if time.perf_counter() > until:
                return

    speeds, clock = [], time.perf_counter()
    for _, metrics in epochs.run_pieces(programs.train, state, turns()):
        now = time.perf_counter()
        speeds.append(int(np.sum(metrics.count)) / (now - clock))
        clock = now
    memory = jax_memory() or worker.peak_memory()
    return {"images_per_second": statistics.median(speeds), "peak_memory_mib": memory / 2**20}


def median(entry: dict, key: str) -> float:
    return statistics.median(run[key] for run in entry["runs"])


def table(result: dict) -> str:
    """Medians as Markdown, one point a line."""
    lines = ["| varied | value | images/s (lowest to highest) | peak memory |", "|---|---|---|---|"]
    for entry in result["points"]:
        ((axis, value),) = entry["point"].items()
        speeds = [run["images_per_second"] for run in entry["runs"]]
        lines.append(
            f"| {axis.replace('_', ' ')} | {value:,} | {suite.spread(speeds)} "
            f"| {median(entry, 'peak_memory_mib'):,.0f} MiB |"
        )
    usual = ", ".join(f"{axis.replace('_', ' ')} {v:,}" for axis, v in result["usual"].items())
    lines += [
        "",
        f"`{result['network']}`, where not varied {usual}; "
        f"medians of {len(result['points'][0]['runs'])} runs; "
        f"{suite.conditions(result)}",
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict, file: Path) -> None:
    """Speed and memory against each axis."""
    figure = suite.figure(11, 5.5)
    rows = figure.subplots(2, len(AXES))
    for column, axis in enumerate(AXES):
        entries = [entry for entry in result["points"] if axis in entry["point"]]
        values = [entry["point"][axis] for entry in entries]
        for row, key in enumerate(("images_per_second", "peak_memory_mib")):
            axes = rows[row][column]
            axes.plot(values, [median(entry, key) for entry in entries], "o-", color="black")
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.minorticks_off()
            axes.set_xlabel(axis.replace("_", " "))
    rows[0][0].set_ylabel("images/s")
    rows[1][0].set_ylabel("peak memory, MiB")
    figure.suptitle(result["network"])
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    cli.run(main)
