import os
import select
import signal
from contextlib import suppress

import pytest

from mnist_flax import signals


def test_a_signal_is_noted_and_the_next_acts_as_before(monkeypatch, capfd):
    # One that comes at once is the same.
    now, acted = [100.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    before = signal.signal(signal.SIGTERM, lambda *_: acted.append(True))
    try:
        with signals.noted() as received:
            signal.raise_signal(signal.SIGTERM)
            for passed in (0.0, 0.5):
                now[0] += passed
                signal.raise_signal(signal.SIGTERM)
                assert (received, acted) == ([signal.SIGTERM], [])
            now[0] += 1
            signal.raise_signal(signal.SIGTERM)
            assert (received, acted) == ([signal.SIGTERM], [True])
        said = "SIGTERM: saving when the steps under way are made; another signal stops at once"
        assert capfd.readouterr().err == f"{said}\n"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_that_is_not_pythons_is_kept(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    # As Python says of one that a program in C has installed.
    monkeypatch.setattr(signal, "getsignal", lambda signum: None)
    with signals.noted():
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGINT) == before


def test_a_signal_that_is_ignored_stays_so():
    # As a script's shell has Ctrl-C ignored by what it runs in the background.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.noted() as received:
            signal.raise_signal(signal.SIGINT)
        assert not received
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def _read_until(text: bytes, descriptor: int) -> bytes:
    """What arrives up to `text`, or within a minute: a terminal hands it over piece by piece."""
    read = b""
    while text not in read and select.select([descriptor], [], [], 60)[0]:
        read += os.read(descriptor, 1000)
    return read


def test_what_is_written_to_a_terminal_that_is_gone_is_lost():
    """Where it is still there, it is written."""
    master, terminal = os.openpty()
    files = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        for descriptor in (1, 2):
            os.dup2(terminal, descriptor)
        with signals.noted():
            signal.raise_signal(signal.SIGHUP)
            assert os.write(1, b"seen") == 4
            assert b"seen" in _read_until(b"seen", master)
        with signals.noted():
            os.close(master)
            signal.raise_signal(signal.SIGHUP)
            assert os.write(1, b"lost") == os.write(2, b"lost") == 4
    finally:
        for descriptor, file in zip((1, 2), files, strict=True):
            os.dup2(file, descriptor)
            os.close(file)
        os.close(terminal)


@pytest.mark.parametrize("error", [None, ValueError])
def test_signals_act_as_before_once_it_is_over(error):
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(signum) for signum in kinds]
    with suppress(ValueError), signals.noted():
        assert not set(before) & {signal.getsignal(signum) for signum in kinds}
        if error:
            raise error
    assert [signal.getsignal(signum) for signum in kinds] == before
