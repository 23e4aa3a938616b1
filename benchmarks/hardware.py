"""What a measurement ran on."""

import os
import platform
from pathlib import Path


def describe(device: str) -> str:
    """The processor and its cores, and the GPU where it is one that was measured."""
    cpu = f"{os.cpu_count()} cores of {_cpu_name()}"
    if device == "cpu":
        return cpu
    import jax

    return f"{jax.devices('gpu')[0].device_kind}, {cpu}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in names if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
