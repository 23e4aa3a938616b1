"""Images a second of each way to bring MNIST to the device, alone and while training.

    python -m benchmarks.input_pipeline
    python -m benchmarks.input_pipeline --network larger --repetitions 5

"tfds" reads and decodes from TFDS's data source, in one thread and as many examples a call as the
loader, and does nothing else; "grain" is the streaming loader without training; "train, stream" and
"train, resident" train an epoch with either loader. MNIST must have been prepared, which training a
recipe once does.
"""

import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import hardware, recipes, suite
from mnist_flax import batches, cli, datasets, epochs, loaders, models, parallel, parts
from mnist_flax import state as state_lib


def main(argv: list[str] | None = None) -> None:
    parser = suite.parser("input_pipeline", __doc__, device=False)
    parser.add_argument("--network", choices=models.names(), default="larger")
    parser.add_argument("--split", default="train", help="a TFDS slice")
    parser.add_argument("--dataset", default="mnist")
    args = parser.parse_args(argv)

    suite.check_installed(("the plot", "matplotlib"))
    ways = create(args.network, args.dataset, args.split)
    speeds = {name: [] for name in ways}
    for repetition in range(args.repetitions):
        for name, way in ways.items():
            clock = time.perf_counter()
            speeds[name].append(way() / (time.perf_counter() - clock))
            done = f"{repetition + 1}/{args.repetitions}"
            print(f"{done} {name}: {speeds[name][-1]:,.0f} images/s", flush=True)

    device = "cpu" if jax.default_backend() == "cpu" else "gpu"
    result = {
        "network": args.network,
        "dataset": args.dataset,
        "split": args.split,
        **hardware.origin(device),
        "images_per_second": speeds,
    }
    file = args.results / f"input_pipeline_{suite.suffix(device, dataset=args.dataset)}.json"
    suite.write(result, file, table(result))
    suite.bars({f"images/s, {args.network}": speeds}, file.with_suffix(".png"))


def create(network: str, dataset: str, split: str) -> dict[str, Callable[[], int]]:
    """The ways by name: each brings every image once and returns their number."""
    config = recipes.config(network)
    mesh = parallel.create_mesh(config)
    data = {name: loaders.create(name, dataset, split, "", mesh) for name in loaders.NAMES}
    size = data["stream"].size
    order = np.random.default_rng(0).permutation(size)
    rows = batches.train_batches(0, 0, size, config.batch_size)[:, None]
    model = parts.create_model(config, datasets.num_classes(dataset))
    tx = parts.create_optimizer(config, size)

    def length(loader: loaders.Loader) -> int:
        return parts.piece_length(config, size, loader.max_examples, mesh)

    def tfds() -> int:
        examples = datasets.open_slice(dataset, split)
        for piece in np.array_split(order, len(order) // 1000 + 1):
            examples.read(piece)
        return size

    def grain() -> int:
        for piece in data["stream"].pieces(rows, length(data["stream"])):
            jax.block_until_ready(piece.images)
        return size

    def training(loader: loaders.Loader) -> Callable[[], int]:
        state = parts.initial_state(config, model, tx, loader.image_shape, mesh)
        nothing = loaders.Resident(datasets.load(dataset, "test[:1]"), mesh)
        splits = parts.Data(loader, watch=None, test=nothing, num_classes=model.num_classes)
        programs = parts.compile_programs(config, model, tx, state, splits, mesh)
        # Waits for what would be compiled beside the training.
        programs.score_test(state_lib.variables(state))

        def epoch() -> int:
            nonlocal state
            pieces = loader.pieces(rows, length(loader))
            for newest, _ in epochs.run_pieces(programs.train, state, pieces):
                state = newest
            jax.block_until_ready(state)
            return size

        return epoch

    return {
        "tfds": tfds,
        "grain": grain,
        "train, stream": training(data["stream"]),
        "train, resident": training(data["resident"]),
    }


def table(result: dict) -> str:
    """Medians as Markdown, with the spread."""
    lines = ["| way | images/s (lowest to highest) |", "|---|---|"]
    for name, speeds in result["images_per_second"].items():
        lines.append(f"| {name} | {suite.spread(speeds)} |")
    count = len(next(iter(result["images_per_second"].values())))
    lines += [
        "",
        f"`{result['network']}`, {result['dataset']} ({result['split']}); "
        f"medians of {count} runs; {suite.conditions(result)}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
