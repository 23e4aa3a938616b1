"""What a run ran on, for its records."""

import importlib.metadata
import os
import platform

import jax

import mnist_flax

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "numpy",
)


def device_name() -> str:
    """The device that computations run on, such as "cpu (2 cores)" or "NVIDIA H200"."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    # The cores that this process may use, where the system tells.
    affinity = getattr(os, "sched_getaffinity", None)
    return f"cpu ({len(affinity(0)) if affinity else os.cpu_count()} cores)"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine a result."""
    # Of this package without its metadata, which a checkout that is not installed lacks.
    ours = {"python": platform.python_version(), "mnist-flax": mnist_flax.__version__}
    return ours | {name: importlib.metadata.version(name) for name in _PACKAGES}
