"""Measures training speed: images/s, time to the first step, compile time and peak memory.

    python -m benchmarks.throughput                       # every recipe; what the README shows
    python -m benchmarks.throughput --recipes larger --repetitions 5

Each measurement is a process of its own, as a user starts it, on MNIST at the recipe's batch
size; the recipes take turns, so that a slow spell of the machine meets them all. Clocks stop
when the device has finished. MNIST must be prepared (training a recipe once does that).
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
RECIPES = (
    "larger",
    "baseline",
    "convnet",
    "single_conv_5x5",
    "double_conv_3x3",
    "double_conv_5x5",
    "branched",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="training time to measure, each")
    parser.add_argument("--child", nargs=2, metavar=("RECIPE", "START"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        recipe, started = args.child
        print(json.dumps(measure(recipe, float(started), args.seconds)))
        return
    runs = {recipe: [] for recipe in args.recipes}
    for repetition in range(args.repetitions):
        for recipe in args.recipes:
            command = [sys.executable, "-m", "benchmarks.throughput", f"--seconds={args.seconds}"]
            command += ["--child", recipe, str(time.time())]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            runs[recipe].append(json.loads(done.stdout.splitlines()[-1]))
            speed = runs[recipe][-1]["images_per_second"]
            print(
                f"{repetition + 1}/{args.repetitions} {recipe}: {speed:,.0f} images/s", flush=True
            )
    write(runs)


def measure(recipe: str, started: float, seconds: float) -> dict[str, object]:
    """One measurement in this process, which was started at `started` (Unix time)."""
    import jax

    from mnist_flax import batches, environment, train

    spec = importlib.util.spec_from_file_location(recipe, ROOT / "configs" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()

    data = train.load_data(config)
    model = train.create_model(config, data.num_classes)
    tx = train.create_optimizer(config, len(data.train.labels))
    clock = time.perf_counter()
    state = train.initial_state(config, model, tx, data.train.images.shape[1:])
    programs = train.compile_programs(config, model, tx, state, data)
    compile_seconds = time.perf_counter() - clock

    num_examples = len(data.train.labels)
    rows = batches.train_batches(0, 0, num_examples, config.batch_size)
    length = train.piece_length(config, num_examples)
    ready = time.time() - started
    state, _ = jax.block_until_ready(programs.train(state, rows[:length]))

    speeds = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        clock = time.perf_counter()
        state, metrics = jax.block_until_ready(programs.train(state, rows[:length]))
        speeds.append(int(metrics.count) / (time.perf_counter() - clock))
    steps_per_second = statistics.median(speeds) / config.batch_size
    return {
        "images_per_second": statistics.median(speeds),
        "steps_per_second": steps_per_second,
        "batch_size": config.batch_size,
        # Steps run in pieces, so that the end of the first is taken from their speed.
        "seconds_to_first_step": ready + 1 / steps_per_second,
        "compile_seconds": compile_seconds,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "device": environment.device_name(),
        "versions": environment.versions(),
    }


def write(runs: dict[str, list[dict]]) -> None:
    """Writes all measurements as JSON and their medians as a table."""
    device = next(iter(runs.values()))[0]["device"]
    name = "throughput_" + ("cpu" if device.startswith("cpu") else "gpu")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(runs, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table(runs))


def table(runs: dict[str, list[dict]]) -> str:
    """Medians over the repetitions as Markdown, with the spread of the speed."""
    lines = [
        "| recipe | batch | images/s (lowest to highest) | steps/s | command to first step "
        "| of which compiling | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe, measured in runs.items():

        def median(key, measured=measured):
            return statistics.median(run[key] for run in measured)

        speeds = sorted(run["images_per_second"] for run in measured)
        lines.append(
            f"| `{recipe}` | {measured[0]['batch_size']} | {median('images_per_second'):,.0f} "
            f"({speeds[0]:,.0f} to {speeds[-1]:,.0f}) | {median('steps_per_second'):,.1f} | "
            f"{median('seconds_to_first_step'):.1f} s | "
            f"{median('compile_seconds'):.1f} s | {median('peak_memory_mib'):,.0f} MiB |"
        )
    run = next(iter(runs.values()))[0]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    count = len(next(iter(runs.values())))
    return "\n".join(lines) + f"\n\nMedians of {count} runs; {run['device']}; {versions}.\n"


if __name__ == "__main__":
    main()
