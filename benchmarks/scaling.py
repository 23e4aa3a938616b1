"""Images a second and memory against batch size, size of the data set and width of the network.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --network convnet --device gpu

Each point is a process of its own that trains on random MNIST-shaped images; the points take
turns. What does not vary is the recipe's batch size, 60,000 images and the network's own width.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import hardware, recipes, worker
from benchmarks.throughput import RESULTS
from mnist_flax import cli, environment, models

AXES = {
    "batch_size": (8, 32, 128, 512, 2048),
    "examples": (6_000, 60_000, 240_000),
    "width": (0.5, 1, 2, 4),
}
NETWORKS = [name for name in models.names() if isinstance(models.create(name), models.CNN)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--network", choices=NETWORKS, default="convnet")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="training time of each point")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.point:
        print(json.dumps(measure(args.network, args.seconds, **args.point)))
        return

    usual = {
        "batch_size": recipes.config(args.network).batch_size,
        "examples": 60_000,
        "width": 1,
    }
    points = [{axis: value} for axis, values in AXES.items() for value in values]
    measured = [[] for _ in points]
    for repetition in range(args.repetitions):
        for point, runs in zip(points, measured, strict=True):
            runs.append(run(args, usual | point))
            speed, done = runs[-1]["images_per_second"], f"{repetition + 1}/{args.repetitions}"
            print(f"{done} {point}: {speed:,.0f} images/s", flush=True)

    result = {
        "network": args.network,
        "usual": usual,
        "hardware": hardware.describe(args.device),
        "versions": environment.versions(),
        "points": [
            {"point": point, "runs": runs} for point, runs in zip(points, measured, strict=True)
        ],
    }
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / f"scaling_{args.device}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(result))
    plot(result, file.with_suffix(".png"))


def run(args: argparse.Namespace, point: dict) -> dict[str, float]:
    """Measures one point in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", f"--network={args.network}"]
    command += [f"--seconds={args.seconds}", f"--point={json.dumps(point)}"]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu" if args.device == "cpu" else "cuda",
        # A program from a cache leaves out the memory that compiling takes.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run(
        command, cwd=recipes.ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    network: str, seconds: float, batch_size: int, examples: int, width: float
) -> dict[str, float]:
    """Trains for at least so many seconds in this process."""
    import jax
    import numpy as np

    from benchmarks.peers import ours
    from mnist_flax import batches, datasets, loaders, parallel, train

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, 28, 28, 1), np.uint8)
    labels = rng.integers(0, 10, examples, np.int32)
    config = recipes.config(network)
    config.batch_size = batch_size
    own = models.create(network)
    model = models.create(
        network,
        convs=tuple((round(width * features), *rest) for features, *rest in own.convs),
        dense=tuple(round(width * features) for features in own.dense),
    )
    tx = train.create_optimizer(config, examples)
    mesh = parallel.mesh(config)
    sharding = parallel.replicated(mesh)
    data = loaders.Resident(datasets.Arrays(images, labels), sharding)
    probe = loaders.Resident(datasets.Arrays(images[:500], labels[:500]), sharding)
    splits = train.Data(data, watch=None, test=probe, num_classes=10)
    state = train.initial_state(config, model, tx, data.image_shape, mesh)
    program = train.compile_programs(config, model, tx, state, splits, mesh).train

    length = train.piece_length(config, examples, data.most)
    rows = batches.train_batches(0, 0, examples, batch_size)
    pieces = list(data.pieces(rows[: len(rows) // length * length], length))
    state, _ = jax.block_until_ready(program(state, pieces[0]))
    speeds, begun, turn = [], time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        clock = time.perf_counter()
        state, metrics = program(state, pieces[turn % len(pieces)])
        count = int(metrics.count)
        speeds.append(count / (time.perf_counter() - clock))
        turn += 1
    memory = ours.device_memory() or worker.peak_memory()
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
            f"| {axis.replace('_', ' ')} | {value:,} | {median(entry, 'images_per_second'):,.0f} "
            f"({min(speeds):,.0f} to {max(speeds):,.0f}) "
            f"| {median(entry, 'peak_memory_mib'):,.0f} MiB |"
        )
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    usual = ", ".join(f"{axis.replace('_', ' ')} {v:,}" for axis, v in result["usual"].items())
    lines += [
        "",
        f"`{result['network']}`, where not varied {usual}; medians of {len(entry['runs'])} runs; "
        f"{result['hardware']}; {versions}.",
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict, file: Path) -> None:
    """Speed and memory against each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(2, len(AXES), figsize=(11, 5.5), layout="constrained")
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
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main)
