"""What the command-line programs share: exit codes, and keeping what was compiled."""

import argparse
import sys
from collections.abc import Callable

from mnist_flax import environment
from mnist_flax.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Runs a program; a `UserError` becomes one sentence on stderr and exit code 2.

    Ctrl-C where nothing can be saved yet ends it without a traceback, with exit code 130.
    """
    environment.keep_compiled()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


def run_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The command line of a program on a run folder, of which one checkpoint and seed is meant."""
    parser = argparse.ArgumentParser(
        prog=f"python -m mnist_flax.{program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the folder that training left")
    parser.add_argument("--step", type=int, help="a checkpoint's step; default: the newest")
    parser.add_argument("--seed", type=int, help="which network of a run with several seeds")
    return parser
