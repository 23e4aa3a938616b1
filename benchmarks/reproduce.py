"""Trains every recipe on real MNIST over several seeds and writes the table of results.

    python -m benchmarks.reproduce                              # what the README shows
    python -m benchmarks.reproduce --recipes larger --seeds 5

A run that is stopped goes on where it was, and a finished one is not repeated. What counts is
the accuracy after the last epoch; no epoch is picked.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# Recipe, the tutorial's test accuracy in percent, and the number of seeds by default: three
# where a run takes less than three minutes on two CPU cores.
RECIPES = {
    "larger": (99.03, 3),
    "baseline": (99.07, 3),
    "convnet": (99.22, 3),
    "convnet_5_epochs": (99.18, 3),
    "single_conv_5x5": (99.13, 3),
    "double_conv_3x3": (99.26, 1),
    "double_conv_5x5": (None, 1),
    "branched": (99.25, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce", description=__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, help="seeds 0 to N-1; default: 1 or 3, by the recipe")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="run folders")
    args = parser.parse_args()
    for recipe in args.recipes:
        for seed in range(args.seeds or RECIPES[recipe][1]):
            train(recipe, seed, args.runs / f"{recipe}-seed{seed}")
        write(args.runs)


def train(recipe: str, seed: int, run_dir: Path) -> None:
    """Runs, or finishes, one training in a process of its own."""
    command = [sys.executable, "-m", "mnist_flax.main", f"--config=configs/{recipe}.py"]
    command += [f"--config.seed={seed}", f"--workdir={run_dir}"]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)


def write(runs: Path) -> None:
    """Writes the results of all finished runs as JSON and as a table."""
    summaries = [json.loads(p.read_text()) for p in sorted(runs.glob("*-seed*/summary.json"))]
    # Times are left to benchmarks.throughput: here other work may go on beside a run.
    for summary in summaries:
        for key in ("wall_seconds", "compile_seconds", "images_per_second"):
            del summary[key]
    results = {recipe: [s for s in summaries if s["config_name"] == recipe] for recipe in RECIPES}
    RESULTS.mkdir(exist_ok=True)
    name = "reproduce_" + ("cpu" if summaries[0]["device"].startswith("cpu") else "gpu")
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table(results))


def table(results: dict[str, list[dict]]) -> str:
    """The results as Markdown, one recipe a line."""
    lines = [
        "| recipe | tutorial | test accuracy, mean ± deviation | min | max | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for recipe, runs in results.items():
        if not runs:
            continue
        accuracies = [100 * run["test_accuracy"] for run in runs]
        deviation = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        tutorial = RECIPES[recipe][0]
        lines.append(
            f"| `{recipe}` | {f'{tutorial:.2f} %' if tutorial else 'not printed'} | "
            f"{statistics.mean(accuracies):.2f}{deviation} % | {min(accuracies):.2f} | "
            f"{max(accuracies):.2f} | {len(runs)} |"
        )
    run = next(runs for runs in results.values() if runs)[0]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return "\n".join(lines) + f"\n\n{run['device']}; {versions}.\n"


if __name__ == "__main__":
    main()
