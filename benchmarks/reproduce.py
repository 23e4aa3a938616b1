"""Trains every recipe on real MNIST over several seeds and writes the table of results.

    python -m benchmarks.reproduce                              # what the README shows
    python -m benchmarks.reproduce --recipes larger --seeds 20
    python -m benchmarks.reproduce --keras                      # the same recipes in Keras
    python -m benchmarks.reproduce --dtype bfloat16 --recipes larger --seeds 3
    python -m benchmarks.reproduce --seeds 20 --add             # those that the results lack

A run that is stopped goes on where it was, and a finished one in the folder of runs is not
repeated, nor with --add one that the results have. What counts is the accuracy after the last
epoch; no epoch is picked. The results keep what they had, but for the seeds that were trained.
"""

import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import suite
from benchmarks.recipes import ROOT
from mnist_flax import cli, environment
from mnist_flax.errors import UserError


class Recipe(NamedTuple):
    """The tutorial's test accuracy in percent, and how many seeds to train with."""

    tutorial: float | None
    seeds: int


# Of each recipe, one entry a seed.
Results = dict[str, list[dict[str, Any]]]

RECIPES = {
    "larger": Recipe(99.03, 30),
    "baseline": Recipe(99.07, 10),
    "convnet": Recipe(99.22, 20),
    "convnet_5_epochs": Recipe(99.18, 40),
    "single_conv_5x5": Recipe(99.13, 10),
    "double_conv_3x3": Recipe(99.26, 30),
    "double_conv_5x5": Recipe(None, 20),
    "branched": Recipe(99.25, 5),
}


def main(argv: list[str] | None = None) -> None:
    parser = suite.parser("reproduce", __doc__, dtype=True, repetitions=None)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument(
        "--seeds", type=suite.positive(int), help="seeds 0 to N-1; default: 5 to 40, by the recipe"
    )
    parser.add_argument(
        "--together",
        type=suite.positive(int),
        help="seeds trained at once; default: as many as there are cores, on a GPU 10, and in "
        "Keras there 1",
    )
    parser.add_argument("--add", action="store_true", help="do not repeat what the results have")
    parser.add_argument("--keras", action="store_true", help="train in Keras, as measured beside")
    parser.add_argument(
        "--busy", action="store_true", help="other work goes on beside: leave out the minutes"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="run folders")
    args = parser.parse_args(argv)
    if args.keras and args.dtype != "float32":
        raise UserError("in Keras the recipes are trained in float32 only: leave out --dtype")
    if args.keras:
        suite.check_installed(("--keras", "keras"), ("--keras", "tensorflow"))
    kind = suite.suffix(args.device, args.dtype)
    file, runs = args.results / f"reproduce_{kind}.json", args.runs.absolute() / kind
    before = json.loads(file.read_text()) if file.exists() else {}
    env = os.environ | suite.on_device(args.device)
    by = "keras" if args.keras else "mnist_flax"
    usual = environment.cores()
    if args.device == "gpu":
        usual = 1 if args.keras else 10
    together = args.together or usual
    for recipe in args.recipes:
        runs_done = merged(before if args.add else {}, runs, args.busy)[recipe]
        done = {run["seed"] for run in runs_done if run["by"] == by}
        left = [seed for seed in range(args.seeds or RECIPES[recipe].seeds) if seed not in done]
        while left:
            if args.keras:
                train_in_keras(recipe, left[:together], runs, env)
                del left[:together]
            else:
                # Seeds that follow one another.
                count = 1
                while count < min(together, len(left)) and left[count] == left[0] + count:
                    count += 1
                train(recipe, left[0], count, args.dtype, runs, env)
                del left[:count]
            write(before, runs, file, args.busy)
    write(before, runs, file, args.busy)


def train(recipe: str, first: int, count: int, dtype: str, runs: Path, env: dict[str, str]) -> None:
    """Runs, or finishes, the training of some seeds in a process of its own."""
    command = [sys.executable, "-m", "mnist_flax.main", f"--config=configs/{recipe}.py"]
    command += [f"--config.seed={first}", f"--config.num_seeds={count}"]
    command.append(f"--config.compute_dtype={dtype}")
    run_dir = runs / f"{recipe}-seeds{first}-{first + count - 1}"
    process = subprocess.Popen([*command, f"--workdir={run_dir}"], cwd=ROOT, env=env)
    if any(finish([process])):
        raise SystemExit(f"{recipe} failed, as said above")


def train_in_keras(recipe: str, seeds: list[int], runs: Path, env: dict[str, str]) -> None:
    """The same in Keras, a process for each seed; a run that is stopped begins again."""
    command = [sys.executable, "-m", "benchmarks.scripts.keras_recipe", recipe, str(len(seeds))]
    threads = str(max(1, environment.cores() // len(seeds)))
    names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
    env = env | dict.fromkeys(names, threads) | {"KERAS_BACKEND": "tensorflow"}
    running = []
    for seed in seeds:
        file = runs / f"{recipe}-keras-seed{seed}" / "summary.json"
        running.append(subprocess.Popen([*command, str(seed), str(file)], cwd=ROOT, env=env))
    # All of them, before one that failed ends this.
    if any(finish(running)):
        raise SystemExit(f"{recipe} in Keras failed, as said above")


def finish(running: list[subprocess.Popen]) -> list[int]:
    """Waits for processes and gives their exit codes; a signal that ends this one ends them too."""
    try:
        return [process.wait() for process in running]
    except (KeyboardInterrupt, SystemExit) as stop:
        # Ctrl-C they got themselves. A run then saves what was trained.
        if isinstance(stop, SystemExit):
            for process in running:
                process.terminate()
        for process in running:
            process.wait()
        raise


def write(before: Results, runs: Path, file: Path, busy: bool) -> None:
    """Writes the results of before and of all finished runs as JSON and as a table."""
    found = merged(before, runs, busy)
    suite.write(found, file, table(found))


def merged(before: Results, runs: Path, busy: bool) -> Results:
    """The results of before, but where a finished run in the folder has the same seed.

    Of Keras all runs count: a seed leaves the order of examples open, so that each is another one.
    """
    found = {}
    for recipe in RECIPES:
        entries = [*before.get(recipe, []), *collect(runs, recipe, busy)]
        of_seed = {}
        for run in entries:
            key = run["by"], run["seed"], run["test_loss"] if run["by"] == "keras" else None
            known = of_seed.setdefault(key, run)
            # Not where it is the same run, timed when nothing went on beside.
            if run != known | {"minutes": None}:
                of_seed[key] = run
        found[recipe] = [of_seed[key] for key in sorted(of_seed)]
    return found


def collect(runs: Path, recipe: str, busy: bool) -> Iterator[dict[str, Any]]:
    """One entry a seed, ours and Keras's, of the finished runs of a recipe.

    The minutes are those that each took of all seeds trained at once; None on a busy machine.
    """
    for path in sorted(runs.glob(f"{recipe}-*/summary.json")):
        summary = json.loads(path.read_text())
        seeds = summary.get("seeds", [summary])
        minutes = summary["wall_seconds"] / 60 / summary.get("at_once", len(seeds))
        for each in seeds:
            yield {
                "by": summary.get("by", "mnist_flax"),
                "seed": each["seed"],
                "test_accuracy": each["test_accuracy"],
                "test_loss": each["test_loss"],
                "minutes": None if busy else minutes,
                "ended": date.fromtimestamp(path.stat().st_mtime).isoformat(),
                "device": summary["device"],
                "versions": summary["versions"],
            }


def table(found: Results) -> str:
    """The results as Markdown, one recipe a line."""
    lines = [
        "| recipe | tutorial | test accuracy | lowest | highest | seeds | Keras, same recipe "
        "| minutes a seed: ours, Keras |",
        "|---|---|---|---|---|---|---|---|",
    ]
    devices, versions, timed = {}, {}, {}
    for recipe, runs in found.items():
        ours = [run for run in runs if run["by"] == "mnist_flax"]
        keras = [run for run in runs if run["by"] == "keras"]
        if not runs:
            continue
        tutorial = RECIPES[recipe].tutorial
        printed = f"{tutorial:.2f} %" if tutorial else "not printed"
        accuracies = [100 * run["test_accuracy"] for run in ours]
        own = "– | – | – | 0"
        if ours:
            own = f"{_mean(ours)} | {min(accuracies):.2f} | {max(accuracies):.2f} | {len(ours)}"
        theirs = f"{_mean(keras)} ({len(keras)})" if keras else "–"
        device = _timed_on(runs)
        if device:
            timed.setdefault(device, []).append(f"`{recipe}`")
        lines.append(
            f"| `{recipe}` | {printed} | {own} | {theirs} "
            f"| {_minutes(ours, device)}, {_minutes(keras, device)} |"
        )
        # In order and each once; they differ where results of before were kept.
        for run in runs:
            devices[run["device"]] = None
            for name, version in run["versions"].items():
                if version:
                    versions.setdefault(name, {})[version] = None
    conditions = ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())
    minutes = "; ".join(f"{', '.join(recipes)} on {device}" for device, recipes in timed.items())
    return (
        "\n".join(lines) + "\n\nMean ± standard deviation over the seeds, after the last epoch; "
        f"{', '.join(devices)}; {conditions}.\n" + (f"Minutes: {minutes}.\n" if minutes else "")
    )


def _mean(runs: list[dict[str, Any]]) -> str:
    accuracies = [100 * run["test_accuracy"] for run in runs]
    deviation = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
    return f"{statistics.mean(accuracies):.2f}{deviation} %"


def _timed_on(runs: list[dict[str, Any]]) -> str | None:
    """The device of which the minutes are, as those of two do not compare: where most runs of
    whichever was timed less were timed.
    """
    timed = Counter((run["device"], run["by"]) for run in runs if run["minutes"])

    def counts(device: str) -> tuple[int, int]:
        both = timed[device, "mnist_flax"], timed[device, "keras"]
        return min(both), max(both)

    return max((device for device, _ in timed), key=counts, default=None)


def _minutes(runs: list[dict[str, Any]], device: str | None) -> str:
    measured = [run["minutes"] for run in runs if run["minutes"] and run["device"] == device]
    return f"{statistics.mean(measured):.1f}" if measured else "–"


if __name__ == "__main__":
    cli.run(main)
