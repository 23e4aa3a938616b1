"""Stopping a run by a signal without losing it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Within so many seconds a second signal is the same one, as where make passes on what all processes
# get anyway.
_REPEATED = 1.0


class Stopped(Exception):
    """The run was stopped by `signum`; it is saved if a step had been made."""

    def __init__(self, signum: int, saved: bool):
        how = "and saved" if saved else "before the first step"
        super().__init__(f"stopped by {signal.Signals(signum).name} {how}")
        self.signum = signum


@contextmanager
def noted() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP in a list for the caller to look at.

    The first is answered by a line on stderr. Another one acts as usual, if it does not come
    within a second. Where SIGHUP says that the terminal is gone, what is written to it from then on
    is lost, instead of failing. A signal that was ignored, as Ctrl-C is in a shell's background
    jobs, stays ignored, and one whose handler is not Python's keeps it. Outside the main thread,
    where Python allows no handlers, nothing is collected.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {
        signum: handler
        for signum in _SIGNALS
        if (handler := signal.getsignal(signum)) not in (signal.SIG_IGN, None)
    }

    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    first = 0.0

    def note(signum, frame):
        nonlocal first
        if signum == signal.SIGHUP:
            _leave(terminals)
        if not received:
            received.append(signum)
            first = time.monotonic()
            # Below the line of a progress bar.
            below = "\n" if terminals else ""
            _say(f"{below}{signal.Signals(signum).name}: saving when the steps under way are made")
        elif time.monotonic() - first > _REPEATED:
            restore()
            signal.raise_signal(signum)

    def restore():
        for signum, handler in before.items():
            signal.signal(signum, handler)

    for signum in before:
        signal.signal(signum, note)
    try:
        yield received
    finally:
        restore()


def _leave(terminals: list[int]) -> None:
    for descriptor in terminals:
        if not os.isatty(descriptor):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _say(text: str) -> None:
    # Not `print`, which what was interrupted may be in.
    with suppress(OSError):
        os.write(2, f"{text}; another signal stops at once\n".encode())
