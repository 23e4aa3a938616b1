"""How a program ends, whatever ends it."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mnist_flax import cli, environment, evaluate, import_keras, summary


@pytest.fixture
def exit_code(monkeypatch):
    """A function that runs a program as `cli.run` does and gives its exit code."""
    monkeypatch.setattr(environment, "keep_compiled", lambda: None)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}

    def run(main):
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        return stop.value.code

    yield run
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_too_little_memory_is_one_sentence(exit_code, capsys):
    assert exit_code(lambda: jnp.zeros(2**50).block_until_ready()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the device has too little memory (RESOURCE_EXHAUSTED: ")
    assert error.endswith(
        "): free some, or in training set a lower batch_size or num_seeds, or data.loader=stream\n"
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "program, flags, message",
    [
        (evaluate, [], "the following arguments are required: RUN_DIR"),
        (evaluate, ["x", "--seed=one"], "argument --seed: invalid int value: 'one'"),
        (import_keras, ["a.h5", "x", "--modle=c"], "unrecognized arguments: --modle=c"),
        (summary, ["convnet", "more"], "unrecognized arguments: more"),
    ],
)
def test_a_wrong_flag_is_one_sentence(program, flags, message, exit_code, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", *flags])
    assert exit_code(program.main) == 2
    name = program.__name__
    assert capsys.readouterr().err == f"error: {message}; see python -m {name} --help\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(exit_code, tmp_path, signum):
    def main():
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            Path(folder, "half").touch()
            os.kill(os.getpid(), signum)

    assert exit_code(main) == 128 + signum
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_it_without_a_traceback(exit_code, capsys):
    assert exit_code(lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"


def test_an_output_that_is_closed_is_done_without(tmp_path):
    code = (
        "import sys; from mnist_flax import cli; cli.run(lambda: sys.stdout.isatty() or print(1))"
    )
    command = f'exec "{sys.executable}" -c "{code}" >&-'
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_output_that_takes_nothing_more_is_one_sentence():
    code = "from mnist_flax import cli; cli.run(lambda: print(1))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == b"error: [Errno 28] No space left on device\n"


def test_a_name_that_is_no_text_is_printed_all_the_same():
    code = "from mnist_flax import cli; cli.run(lambda: print('caf\\udce9×'))"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"caf\\udce9\\xd7\n")


def test_too_little_memory_of_the_host_is_one_sentence(exit_code, capsys):
    assert exit_code(lambda: bytes(2**62)) == 2
    assert capsys.readouterr().err == "error: too little memory\n"


def test_a_reader_that_closes_the_output_ends_it_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    code = "from mnist_flax import cli; cli.run(lambda: print(1))"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == b""


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_a_signal_that_is_ignored_or_handled_stays_so(handler, monkeypatch):
    # As `nohup` has SIGHUP ignored.
    monkeypatch.setattr(environment, "keep_compiled", lambda: None)
    before = signal.signal(signal.SIGHUP, handler)
    try:
        cli.run(lambda: None)
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_fault_of_jax_that_is_not_about_memory_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(environment, "keep_compiled", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def main():
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a fault"):
        cli.run(main)


def test_a_warning_is_one_sentence():
    code = (
        "import warnings; from mnist_flax import cli; cli.run(lambda: warnings.warn('it is late'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "warning: it is late\n")
