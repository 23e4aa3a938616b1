"""What a run ran on, for its records."""

import importlib.metadata
import os
import platform

import jax
import psutil

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


def free_memory() -> dict[str, int]:
    """Bytes that are free for data, of this machine and of a device that has its own memory.

    On CPU the data set is held twice for a moment, once by NumPy and once by JAX.
    """
    device = jax.devices()[0]
    host = psutil.virtual_memory().available
    if device.platform == "cpu":
        return {"this machine": host // 2}
    stats = device.memory_stats() or {}
    free = stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else host
    return {"this machine": host, device_name(): free}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine a result."""
    # Of this package without its metadata, which a checkout that is not installed lacks.
    ours = {"python": platform.python_version(), "mnist-flax": mnist_flax.__version__}
    return ours | {name: importlib.metadata.version(name) for name in _PACKAGES}
