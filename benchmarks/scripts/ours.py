"""`python -m mnist_flax.main`, with a look at the clock after its first steps."""

import sys
import time
from pathlib import Path

import jax

from benchmarks import recipes
from mnist_flax import cli, main, report


def run(folder: str, network: str, dataset: str) -> None:
    first_step_at, advance = [], report.advance
    batch_size = recipes.config(network).batch_size

    def timed(bar, position):
        now = time.time()
        if jax.default_backend() == "cpu":
            # Steps are made in pieces; the first ended when the others had not begun.
            now -= position.seconds * (1 - batch_size / position.count)
        # On a GPU the others take a moment, and the first loads what it runs on.
        first_step_at.append(now)
        advance(bar, position)

    report.advance = timed
    config = recipes.ROOT / "configs" / f"{network}.py"
    workdir = Path(folder) / f"run-{time.time()}"
    sys.argv[1:] = [f"--config={config}:{dataset}", "--config.epochs=1", f"--workdir={workdir}"]
    # As the other scripts: train on the whole split, score the test split once.
    sys.argv += ["--config.data.train_split=train", "--config.data.watch_split="]
    sys.argv.append(f"--config.batch_size={batch_size}")
    cli.run(main.main)
    print("first step at", first_step_at[0])


if __name__ == "__main__":
    run(*sys.argv[1:])
