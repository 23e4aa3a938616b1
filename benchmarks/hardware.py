"""What a measurement ran on."""

import subprocess

from mnist_flax import environment
from mnist_flax.errors import UserError


def describe(device: str) -> str:
    """The processor and its cores, and the GPU where it is one that was measured."""
    cpu = f"{environment.cores()} cores of {environment.cpu_name()}"
    if device == "cpu":
        return cpu
    # Not through JAX, which would take the GPU's memory for this process.
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"there is no NVIDIA GPU to measure on: {error}") from error
    return f"{names.splitlines()[0]}, {cpu}"
