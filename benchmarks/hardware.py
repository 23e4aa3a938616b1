"""When, by which code and on what something is measured."""

import os
import subprocess
from collections.abc import Iterable
from datetime import date
from typing import Any

from benchmarks.recipes import ROOT
from mnist_flax import environment
from mnist_flax.errors import UserError

# Of peers; those of this package's own results are environment.versions.
PEER_PACKAGES = ("keras", "tensorflow", "torch")


def origin(device: str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """What a result has to say of itself: date, commit, hardware, and versions, also of `packages`.

    Raises:
        UserError: the device is a GPU, and there is none.
    """
    versions = environment.versions() | {name: environment.version_of(name) for name in packages}
    return {
        "measured": date.today().isoformat(),
        "commit": commit(),
        "hardware": describe(device),
        "versions": versions,
    }


def commit() -> str | None:
    """The commit checked out, with "-dirty" where files differ from it; None without Git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(device: str) -> str:
    """The processor, its cores and the flags of XLA that are set; the GPU too, with its driver."""
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
    gpus = names.splitlines()
    name, driver = gpus[0].split(", ")
    count = f"{len(gpus)} × " if len(gpus) > 1 else ""
    return f"{count}{name} (driver {driver}), {cpu}"
