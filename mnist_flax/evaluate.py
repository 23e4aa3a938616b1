"""Scores a finished or unfinished run: python -m mnist_flax.evaluate RUN_DIR"""

import argparse

from mnist_flax import cli, report, trained


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mnist_flax.evaluate", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the folder that training left")
    parser.add_argument(
        "--split", help="a TFDS slice, such as train[90%%:]; default: the test split"
    )
    parser.add_argument("--step", type=int, help="a checkpoint's step; default: the newest")
    parser.add_argument("--seed", type=int, help="which network of a run with several seeds")
    args = parser.parse_args()
    run = trained.load(args.run_dir, args.step, args.seed)
    split = run.config.data.test_split if args.split is None else args.split
    print(f"{run.config.model} after step {run.step:,}, on {split} of {run.config.data.name}")
    report.score(run.evaluate(split), "Test" if split == run.config.data.test_split else split)


if __name__ == "__main__":
    cli.run(main)
