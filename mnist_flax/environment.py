"""What a run runs on: device, cores, memory and versions; and where it keeps compiled programs."""

import contextlib
import importlib.metadata
import os
import platform
import zlib
from pathlib import Path

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
# JAX's plugins for devices, and the libraries of theirs that choose among algorithms.
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin", "libtpu")
_PLUGINS += ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas")
_CGROUP, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CPUINFO = Path("/proc/cpuinfo")


def device_name(count: int = 1) -> str:
    """What `count` devices compute on: "cpu (2 cores of NAME)", or such as "2 × NVIDIA H200".

    One CPU device has all cores, and of several each has one.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind if count == 1 else f"{count} × {device.device_kind}"
    there = cores()
    used = f"{count} of {there}" if 1 < count < there else str(there)
    return f"cpu ({used} core{'s' if there > 1 else ''} of {cpu_name()})"


def cpu_name() -> str:
    """The processor, as it calls itself; with family and model where that has no number.

    So it is on virtual machines, where generations of one name differ in speed by a factor of two.
    """
    lines = (line.partition(":") for line in _cpuinfo())
    facts = {key.strip(): fact.strip() for key, _, fact in lines}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts and not any(letter.isdigit() for letter in name):
        name += f" family {facts['cpu family']} model {facts['model']}"
    return name


def cores() -> int:
    """The number of cores this process may use: its affinity's, or fewer by a container's quota."""
    count = processors()
    for group in _cgroups():
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, (group / "cpu.max").read_text().split())
            count = min(count, max(1, quota // period))
    return count


def processors() -> int:
    """The number of cores in this process's affinity, whatever a container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def _cgroups() -> list[Path]:
    """Linux's control groups that limit this process: its own and those above it."""
    own = ""
    with contextlib.suppress(OSError):
        for line in _OWN_CGROUP.read_text().splitlines():
            if line.startswith("0::/") and ".." not in line:
                own = line.removeprefix("0::/")
    group = _CGROUP / own
    return [group, *group.parents[: len(Path(own).parts)]]


def keep_compiled() -> None:
    """Has JAX keep what it compiles in mnist_flax/ in XDG_CACHE_HOME, or else in ~/.cache.

    Compiling takes most of the time to the first step; a program that was compiled before, on a
    processor with the same instructions, is read in a tenth of a second instead. A folder that
    JAX_COMPILATION_CACHE_DIR names is taken, and none where the user has no home folder or the
    cache folder cannot be written.
    """
    if jax.config.jax_compilation_cache_dir is None:
        given = os.environ.get("XDG_CACHE_HOME", "")
        cache = Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache"))
        # The user has no home folder.
        if not cache.is_absolute():
            return
        # Machines that share a home folder need not share a processor.
        folder = cache / "mnist_flax" / f"compiled-{zlib.crc32(_instruction_sets()):08x}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX's own second would leave out the programs that initialise and score.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _instruction_sets() -> bytes:
    found = {line for line in _cpuinfo() if line.startswith(("flags", "Features", "model name"))}
    return ("".join(sorted(found)) or platform.processor()).encode()


def _cpuinfo() -> list[str]:
    """What Linux says of each core, by line; empty elsewhere."""
    try:
        return _CPUINFO.read_text().splitlines()
    except OSError:
        return []


def free_memory() -> tuple[int, int | None]:
    """Free bytes of this machine, and of the device where it has a memory of its own and tells."""
    host = psutil.virtual_memory().available
    # A container may have less than the machine.
    for group in _cgroups():
        with contextlib.suppress(OSError, ValueError):
            kinds = ("max", "current", "stat")
            limit, used, stat = ((group / f"memory.{kind}").read_text() for kind in kinds)
            # The system gives up what it keeps of files.
            by_kind = dict(line.split() for line in stat.splitlines())
            kept = sum(int(by_kind.get(kind, 0)) for kind in ("inactive_file", "active_file"))
            host = min(host, int(limit) - int(used) + kept)
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return host, None
    return host, stats["bytes_limit"] - stats["bytes_in_use"]


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of those that determine a result.

    None for one without a package's metadata. JAX's plugins for devices only where installed.
    """
    # Our own without metadata, which a checkout that is not installed lacks.
    ours = {"python": platform.python_version(), "mnist-flax": mnist_flax.__version__}
    plugins = {name: version for name in _PLUGINS if (version := version_of(name))}
    return ours | {name: version_of(name) for name in _PACKAGES} | plugins


def version_of(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
