import os
import signal
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mnist_flax import datasets, parts

# Several devices, for `jax.pmap`; everything else must cope with their presence.
jax.config.update("jax_num_cpu_devices", 4)
if jax.__version_info__ < (0, 11):
    # One thread a device, as the package has it where cores are devices: the tests of another
    # process keep the other cores busy.
    os.environ["NPROC"] = "1"
# A shell starts background jobs with Ctrl-C ignored, and `nohup` has SIGHUP ignored, which their
# own processes inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Keras's backend without TensorFlow.
os.environ.setdefault("KERAS_BACKEND", "jax")


def shared_folder(tmp_path_factory, name):
    """A folder that all processes of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """One data folder for all tests that only read what is prepared in it."""
    return shared_folder(tmp_path_factory, "tfds")


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory) -> Path:
    """One folder for all programs that the tests compile and keep."""
    return shared_folder(tmp_path_factory, "cache")


@pytest.fixture(autouse=True)
def data_dir(monkeypatch, prepared, cache_home) -> Path:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.delenv("MNIST_FLAX_MANUAL_DIR", raising=False)
    return prepared


@pytest.fixture(scope="session", autouse=True)
def kept_programs(tmp_path_factory):
    """Keeps what takes long to compile, since many tests compile the same."""
    # Of each process by itself: JAX may read what another one has not yet written as a whole.
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))


@pytest.fixture(scope="session")
def mnist_gz() -> Path:
    """The folder with the four official files of MNIST."""
    folder = os.environ.get("MNIST_FLAX_TEST_MNIST")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MNIST_FLAX_TEST_MNIST does not name a folder with the four .gz files of MNIST")
    return Path(folder)


@pytest.fixture(scope="session")
def mnist(mnist_gz, prepared) -> Path:
    """MNIST prepared from the four files, with every look at the network an error."""

    def no_network(*args, **kwargs):
        raise AssertionError("the network was used")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(prepared))
        patch.setattr(socket, "getaddrinfo", no_network)
        patch.setattr(socket.socket, "connect", no_network)
        datasets.load("mnist", "test", manual_dir=str(mnist_gz))
    return mnist_gz


@pytest.fixture(scope="module")
def compiled_once():
    """Lets runs of one configuration and mesh share what they compile, most of their time."""
    initial_state, compile_programs = parts.initial_state, parts.compile_programs
    compiled = {}

    def shared(kind, config, mesh, make):
        key = kind, config.to_json(), mesh
        if key not in compiled:
            compiled[key] = make()
        return compiled[key]

    def state_copy(config, *args):
        # A copy, since a run donates it.
        state = shared("state", config, args[-1], lambda: initial_state(config, *args))
        return jax.tree.map(jnp.copy, state)

    def programs(config, *args):
        return shared("programs", config, args[-1], lambda: compile_programs(config, *args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "initial_state", state_copy)
        patch.setattr(parts, "compile_programs", programs)
        yield
