"""What a measurement ran on."""

import os
import subprocess

from mnist_flax import environment
from mnist_flax.errors import UserError


def describe(device: str) -> str:
    """The processor and its cores, the GPU and its driver where it is one that was measured, and
    the flags of XLA that were set."""
    cpu = f"{environment.cores()} cores of {environment.cpu_name()}"
    if flags := os.environ.get("XLA_FLAGS"):
        cpu += f", XLA_FLAGS={flags}"
    if device == "cpu":
        return cpu
    # Not through JAX, which would take the GPU's memory for this process.
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"there is no NVIDIA GPU to measure on: {error}") from error
    name, driver = names.splitlines()[0].split(", ")
    return f"{name} (driver {driver}), {cpu}"
