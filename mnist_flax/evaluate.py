"""Scores a finished or unfinished run: python -m mnist_flax.evaluate RUN_DIR"""

from mnist_flax import cli, report, trained


def main() -> None:
    parser = cli.run_parser("mnist_flax.evaluate", __doc__)
    parser.add_argument(
        "--split", help="a TFDS slice, such as train[90%%:]; default: the test split"
    )
    args = parser.parse_args()
    run = trained.load(args.run_dir, args.step, args.seed)
    split = run.config.data.test_split if args.split is None else args.split
    score = run.evaluate(split)
    print(f"{run.config.model} after step {run.step:,}, on {split} of {run.config.data.name}")
    report.score(score, "Test" if split == run.config.data.test_split else split)


if __name__ == "__main__":
    cli.run(main)
