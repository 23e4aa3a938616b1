"""Stopping a run by a signal without losing it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """The run was stopped by `signum`; it is saved if a step had been made."""

    def __init__(self, signum: int, saved: bool):
        how = "and saved" if saved else "before the first step"
        super().__init__(f"stopped by {signal.Signals(signum).name} {how}")
        self.signum = signum


@contextmanager
def noted() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list for the caller to look at.

    The first signal restores the handlers of before, so that a second one acts as usual. A signal
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
        for signum in (signal.SIGINT, signal.SIGTERM)
        if (handler := signal.getsignal(signum)) not in (signal.SIG_IGN, None)
    }

    def note(signum, frame):
        received.append(signum)
        restore()

    def restore():
        for signum, handler in before.items():
            signal.signal(signum, handler)

    for signum in before:
        signal.signal(signum, note)
    try:
        yield received
    finally:
        restore()
