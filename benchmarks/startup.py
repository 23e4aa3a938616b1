"""Time to the first training step and to the end of a one-epoch script, and peak memory.

    python -m benchmarks.startup
    python -m benchmarks.startup --network baseline --repetitions 3
    python -m benchmarks.startup --device gpu

Each is a whole process: it imports its framework, reads MNIST from disk, builds the network,
trains one epoch and scores the test set. Ours is `python -m mnist_flax.main`, which also writes
its run folder and checkpoint: once with nothing compiled before, and once again after that. The
others are scripts as their users write them. They take turns. On a GPU our first steps are one
program of up to an epoch, and its end is taken for the first's.
`pip install ".[bench]"` brings Keras and PyTorch; MNIST must have been prepared, which training a
recipe once does.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import hardware, recipes, suite
from benchmarks.throughput import OURS
from benchmarks.worker import RSS_UNIT
from mnist_flax import cli, datasets, models

AGAIN = f"{OURS}, again"
# The module in benchmarks/scripts/ and what it needs.
SCRIPTS = {
    OURS: ("ours", ()),
    AGAIN: ("ours", ()),
    "keras-tf": ("keras_tf", ("keras", "tensorflow")),
    "torch": ("torch_eager", ("torch",)),
}


def main(argv: list[str] | None = None) -> None:
    parser = suite.parser("startup", __doc__)
    parser.add_argument("--network", choices=models.names(), default="larger")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, help="default: all there are")
    parser.add_argument("--dataset", default="mnist", help="any that mnist_flax knows, 28×28×1")
    args = parser.parse_args(argv)
    suite.check_installed(("the plot", "matplotlib"))
    able = suite.installed(
        {name: packages for name, (_, packages) in SCRIPTS.items()}, args.scripts
    )
    # Ours is always measured: the ratios are to it.
    scripts = list({OURS: None} | dict.fromkeys(able))
    origin = hardware.origin(args.device, hardware.PEER_PACKAGES)

    file = args.results / f"startup_{suite.suffix(args.device, dataset=args.dataset)}.json"
    runs = {script: [] for script in scripts}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), args)
        for repetition in range(args.repetitions):
            for script in scripts:
                runs[script].append(run(script, args, Path(folder)))
                first, whole = (runs[script][-1][k] for k in ("first_step", "whole_process"))
                done = f"{repetition + 1}/{args.repetitions}"
                print(
                    f"{done} {script}: first step {first:.1f} s, process {whole:.1f} s", flush=True
                )
            result = {"network": args.network, "dataset": args.dataset, **origin, "runs": runs}
            suite.write(result, file, table(result))
    titles = {
        "first_step": "seconds from the command to the first step",
        "whole_process": "seconds of the process, one epoch",
    }
    panels = {title: column(result, key) for key, title in titles.items()}
    suite.bars(panels, file.with_suffix(".png"))


def write_data(folder: Path, args: argparse.Namespace) -> None:
    """Writes what the scripts read: MNIST as one compressed .npz, as Keras distributes it."""
    train, test = (datasets.load(args.dataset, split) for split in ("train", "test"))
    np.savez_compressed(
        folder / "data.npz",
        x_train=train.images,
        y_train=train.labels,
        x_test=test.images,
        y_test=test.labels,
    )
    config = recipes.config(args.network)
    job = {
        "device": args.device,
        "spec": recipes.spec_of(args.network),
        "batch_size": config.batch_size,
        "optimizer": config.optimizer,
    }
    (folder / "job.json").write_text(json.dumps(job))


def run(script: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds from the command to the end of the first step, and of the process; its memory."""
    arguments = []
    if script in (OURS, AGAIN):
        arguments = [args.network, args.dataset]
        if script == OURS:
            shutil.rmtree(folder / "cache", ignore_errors=True)
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env = kept | suite.on_device(args.device)
    env |= {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    module = f"benchmarks.scripts.{SCRIPTS[script][0]}"
    began = time.time()
    with (folder / "output").open("w+") as output:
        command = [sys.executable, "-m", module, str(folder), *arguments]
        process = subprocess.Popen(
            command, cwd=recipes.ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
        )
        # Unlike `wait` it tells the memory.
        _, status, usage = os.wait4(process.pid, 0)
        whole = time.time() - began
        output.seek(0)
        lines = output.read().splitlines()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("\n".join([*lines, f"{script} failed, as said above"]))
    first = next(line for line in lines if line.startswith("first step at "))
    return {
        "first_step": float(first.split()[-1]) - began,
        "whole_process": whole,
        "peak_memory_mib": usage.ru_maxrss * RSS_UNIT / 2**20,
    }


def column(result: dict, key: str) -> dict[str, list[float]]:
    """What was measured of each script under a key."""
    return {script: [run[key] for run in runs] for script, runs in result["runs"].items()}


def table(result: dict) -> str:
    """Medians as Markdown, with the spread, and the ratio to ours."""
    lines = [
        "| script | command to first step (lowest to highest) | ratio "
        "| whole process, one epoch | ratio | peak memory |",
        "|---|---|---|---|---|---|",
    ]

    for script in result["runs"]:
        cells = []
        for key in ("first_step", "whole_process"):
            values, ours = (column(result, key)[name] for name in (script, OURS))
            ratio = statistics.median(values) / statistics.median(ours)
            cells += [suite.spread(values, ".1f", " s"), f"{ratio:.2f}"]
        cells.append(f"{statistics.median(column(result, 'peak_memory_mib')[script]):,.0f} MiB")
        lines.append(f"| {script} | " + " | ".join(cells) + " |")
    turns = len(result["runs"][OURS])
    lines += [
        "",
        f"`{result['network']}`, one epoch; medians of {turns} turns; {suite.conditions(result)}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
