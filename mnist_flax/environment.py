"""What a run ran on, for its records."""

import importlib.metadata
import os
import platform

import jax

_PACKAGES = (
    "mnist-flax",
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
    return f"cpu ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine a result."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }
