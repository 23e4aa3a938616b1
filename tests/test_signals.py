import signal

from mnist_flax import signals


def test_a_signal_is_noted_and_the_next_acts_as_before(monkeypatch):
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
