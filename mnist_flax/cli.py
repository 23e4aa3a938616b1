"""What the command-line programs share: parsers, exit codes, and keeping what was compiled."""

import argparse
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import jax

from mnist_flax import environment
from mnist_flax.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Runs a program; a `UserError` becomes one sentence on stderr and exit code 2.

    So does what the device or the system refuses, such as memory, or output to a full disk. Ctrl-C,
    SIGTERM and SIGHUP where nothing can be saved yet end it without a traceback and with nothing
    half-written, with 128 + the signal's number, as does a reader of the output that has closed it.
    """
    environment.keep_compiled()
    warnings.showwarning = _show_warning
    # None where the caller has closed it.
    sys.stdout = sys.stdout or io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on stderr: a name of a file may be no text, or not in the terminal's alphabet.
        sys.stdout.reconfigure(errors="backslashreplace")
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) == signal.SIG_DFL:
            signal.signal(ending, lambda signum, frame: sys.exit(128 + signum))
    try:
        main()
        # Here, where a fault can be told.
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"error: the device has too little memory ({reason}): free some, or in training set a "
            "lower batch_size or num_seeds, or data.loader=stream",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except (OSError, MemoryError) as error:
        print(f"error: {str(error) or 'too little memory'}", file=sys.stderr)
        _drop_output()
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _show_warning(message: Warning, *_: Any, **__: Any) -> None:
    """One sentence, without the line of code that said it."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Python would fail once more where it flushes the output at its end."""
    # Where the caller has closed it, it is no file.
    with suppress(io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """The command line of `python -m MODULE`, to which a flag that is wrong is a `UserError`."""
    return _Parser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_parser(module: str, description: str) -> argparse.ArgumentParser:
    """The command line of a program that reads one checkpoint, and one seed, of a run folder."""
    made = parser(module, description)
    made.add_argument("run_dir", metavar="RUN_DIR", help="the folder that training left")
    made.add_argument("--step", type=int, help="a checkpoint's step; default: the newest")
    made.add_argument("--seed", type=int, help="which network of a run with several seeds")
    return made
