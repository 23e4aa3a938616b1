"""Images a second of all seeds together against their number (`num_seeds`).

    python -m benchmarks.seeds
    python -m benchmarks.seeds --networks larger branched --seeds 1 2 4 8 16

Each point is a process of its own that trains on random MNIST-shaped images at the recipe's batch
size; the points take turns.
"""

import statistics
from pathlib import Path

from benchmarks import hardware, scaling, suite
from mnist_flax import cli


def main(argv: list[str] | None = None) -> None:
    parser = suite.parser("seeds", __doc__, repetitions=3, seconds=2, networks=True)
    parser.add_argument("--seeds", nargs="+", type=suite.positive(int), default=[1, 2, 4, 8])
    args = parser.parse_args(argv)
    suite.check_installed(("the plot", "matplotlib"))
    origin = hardware.origin(args.device)

    file = args.results / f"seeds_{args.device}.json"
    speeds = {network: {count: [] for count in args.seeds} for network in args.networks}
    for repetition in range(args.repetitions):
        for network in args.networks:
            for count, found in speeds[network].items():
                run = scaling.run(network, args.device, args.seconds, {"num_seeds": count})
                found.append(run["images_per_second"])
                done = f"{repetition + 1}/{args.repetitions}"
                print(f"{done} {network}, {count} seeds: {found[-1]:,.0f} images/s", flush=True)
            measured = {name: found for name, found in speeds.items() if all(found.values())}
            result = origin | {"images_per_second": measured}
            suite.write(result, file, table(result))
    plot(result, file.with_suffix(".png"))


def table(result: dict) -> str:
    """Medians as Markdown, a network a line, and the ratio of the most seeds to the fewest."""
    speeds = result["images_per_second"]
    counts = list(next(iter(speeds.values())))
    lines = [
        "| network | " + " | ".join(f"{n} seed{'s' * (int(n) > 1)}" for n in counts) + " | ratio |",
        "|---" * (len(counts) + 2) + "|",
    ]
    for network, found in speeds.items():
        cells = [suite.spread(values) for values in found.values()]
        ratio = statistics.median(found[counts[-1]]) / statistics.median(found[counts[0]])
        lines.append(f"| `{network}` | {' | '.join(cells)} | {ratio:.2f} |")
    # They differ in a run that was stopped.
    turns = sorted({len(values) for found in speeds.values() for values in found.values()})
    lines += [
        "",
        f"Images/s of all seeds together; medians of {' to '.join(map(str, turns))} turns "
        "(lowest to highest); the ratio "
        f"is of the last column to the first; {suite.conditions(result)}",
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict, file: Path) -> None:
    """Speed against the number of seeds, as a multiple of the speed with the fewest."""
    figure = suite.figure(7, 4)
    axes = figure.subplots()
    for network, found in result["images_per_second"].items():
        medians = [statistics.median(values) for values in found.values()]
        axes.plot(list(found), [speed / medians[0] for speed in medians], "o-", label=network)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(found), [f"{count}" for count in found])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seeds trained at once")
    axes.set_ylabel("images/s in total, relative")
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    cli.run(main)
