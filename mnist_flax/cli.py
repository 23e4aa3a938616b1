"""What the command-line programs share: exit codes, and keeping what was compiled."""

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
