"""Stopping a run by a signal without losing it."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Within so many seconds a second signal is the same stop once more, as where make passes on what
# all processes get.
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

    After the first another one acts as usual, if it does not come within a second. A signal
    that was ignored, as Ctrl-C is in a shell's background jobs, stays ignored, and one whose
    handler is not Python's keeps it. Outside the main thread, where Python allows no handlers,
    nothing is collected.
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

    first = 0.0

    def note(signum, frame):
        nonlocal first
        if not received:
            received.append(signum)
            first = time.monotonic()
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
