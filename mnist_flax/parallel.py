"""Devices that share each batch, or deal the seeds out; on CPU every core can be such a device.

XLA's CPU client gives one operation at a time to all cores. A device for each core, with one
thread and its own share of the batch, keeps what it computes in that core's cache, and waits for
the others once a step, where the gradients are summed.
"""

import importlib.metadata
import math
import os
import warnings
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mnist_flax import environment
from mnist_flax.errors import UserError

SEEDS, BATCH = "seeds", "batch"

# Fewer examples than this leave a core more work with the gradients' sum than with the examples,
# and such a share is not split into blocks either (`tiles.is_split`).
_MIN_EXAMPLES = 16


def create_mesh(config: ConfigDict) -> Mesh:
    """The devices that train: rows for different seeds, in each of which devices share batches.

    Called before JAX's first computation, it turns CPU cores into JAX devices. Where JAX has
    started, or the number of CPU devices was set, it takes from the devices that exist.

    Raises:
        UserError: there are fewer than `config.parallel`, or not the kind that was asked for, or of
            several processes this one would have none.
    """
    cores = environment.cores()
    _make_cores_devices(min(cores, math.prod(_shape(config, cores))))
    found = devices()
    on_cpu = found[0].platform == "cpu"
    if on_cpu and not _cpu_only():
        warnings.warn(
            "JAX has a plugin for GPU or TPU and could not use one: this runs on CPU; "
            "set JAX_PLATFORMS=cpu where that is meant",
            stacklevel=2,
        )
    shape = _shape(config, min(cores, len(found)) if on_cpu else 1)
    if (count := math.prod(shape)) > len(found):
        raise UserError(
            f"parallel={count} asks for more devices than there are: {len(found)} "
            f"({environment.device_name()}); 0 takes what pays"
        )
    chosen = _mesh(found[:count], shape)
    if not chosen.local_devices:
        raise UserError(
            f"parallel={count} leaves process {jax.process_index()} of {jax.process_count()} "
            f"without a device: set parallel={len(found)}, the number of all devices"
        )
    return chosen


def limit_threads() -> None:
    """Limits XLA's threads on CPU to the cores that a container may use; XLA counts all there are.

    Without effect where JAX has started.
    """
    if (share := environment.cores()) < environment.processors():
        os.environ.setdefault("NPROC", str(share))


def single_mesh() -> Mesh:
    """The first device of this process alone."""
    own = [device for device in devices() if device.process_index == jax.process_index()]
    return _mesh(own[:1], (1, 1))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has: the data set, the state of one seed."""
    return NamedSharding(mesh, PartitionSpec())


def seeds_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of what has a leading axis of seeds."""
    return NamedSharding(mesh, PartitionSpec(SEEDS))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of the rows of batches, [steps, seeds, B]: each device has its seeds' share."""
    return NamedSharding(mesh, PartitionSpec(None, SEEDS, BATCH))


def per_device_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is one block for each device after the other."""
    return NamedSharding(mesh, PartitionSpec((SEEDS, BATCH)))


def fetch(tree: Any) -> Any:
    """The arrays of a tree as NumPy's, whole.

    Where processes hold different parts of one, all must call this: each waits for the others.
    """

    def whole(array: jax.Array) -> jax.Array | np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return array
        # Here, as one process does not need it.
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(array, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def devices() -> list[jax.Device]:
    """JAX's devices.

    Raises:
        UserError: there is none of the kind that was asked for.
    """
    try:
        return jax.devices()
    # JAX asserts that there is a device where JAX_PLATFORMS is "cuda" and there is no GPU.
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or "none of the kind asked for is here").splitlines()[0]
        raise UserError(
            f"JAX has no device to compute on ({reason}): unset JAX_PLATFORMS, "
            "or set it to a kind that this machine has"
        ) from error


def _mesh(devices: list[jax.Device], shape: tuple[int, int]) -> Mesh:
    return Mesh(np.array(devices).reshape(shape), (SEEDS, BATCH), axis_types=(AxisType.Auto,) * 2)


def _shape(config: ConfigDict, devices: int) -> tuple[int, int]:
    """How many of the devices share the seeds, and how many each batch."""
    if config.parallel:
        rows = math.gcd(config.num_seeds, config.parallel)
        return rows, config.parallel // rows
    shapes = [
        (rows, max(1, min(devices // rows, config.batch_size // _MIN_EXAMPLES)))
        for rows in range(1, devices + 1)
        if config.num_seeds % rows == 0
    ]
    # Most devices; on a tie the fewest to a batch, as those wait for each other.
    return max(shapes, key=lambda shape: (math.prod(shape), shape[0]))


def _make_cores_devices(count: int) -> None:
    if jax.config.jax_num_cpu_devices != -1 or not _cpu_only():
        return
    if count == 1:
        limit_threads()
        return
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return
    if jax.__version_info__ < (0, 11):
        # Otherwise each device splits its operations among all cores. Later versions have a pool
        # of threads for each device, which this would shrink to one thread for all.
        os.environ.setdefault("NPROC", "1")
    else:
        limit_threads()


def _cpu_only() -> bool:
    """Whether JAX will compute on CPU, as far as can be told without starting it."""
    platforms = jax.config.jax_platforms
    if platforms:
        # The first of several is the default.
        return platforms.partition(",")[0] == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins")
