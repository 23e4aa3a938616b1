"""Devices that share each batch; on CPU every core can be such a device.

XLA's CPU client gives one operation at a time to all cores. A device for each core, with one
thread and its own share of the batch, keeps what it computes in that core's cache, and waits for
the others once a step, where the gradients are summed.
"""

import importlib.metadata
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mnist_flax import environment
from mnist_flax.errors import UserError
from mnist_flax.loaders import Loader, Piece

AXIS = "devices"

# Fewer examples than this leave a core more work with the gradients' sum than with the examples.
_LEAST_EXAMPLES = 16


def mesh(config: ConfigDict) -> Mesh:
    """The devices that train.

    Called before JAX's first computation, it makes devices of CPU cores; later, and where the
    number of CPU devices was set already, it takes of those that there are.

    Raises:
        UserError: there are fewer than `config.parallel`.
    """
    _make_cores_devices(_cpu_devices(config))
    devices = jax.devices()
    count = config.parallel
    if not count:
        count = min(_cpu_devices(config), len(devices)) if devices[0].platform == "cpu" else 1
    if count > len(devices):
        raise UserError(
            f"parallel={count} asks for more devices than there are: {len(devices)} "
            f"({environment.device_name()}); 0 takes what pays"
        )
    return _mesh(devices[:count])


def single_mesh() -> Mesh:
    """The first device alone."""
    return _mesh(jax.devices()[:1])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has: the data set, the state."""
    return NamedSharding(mesh, PartitionSpec())


def compile_epoch(
    epoch: Callable,
    mesh: Mesh,
    carried: Any,
    loader: Loader,
    batch_size: int,
    steps: int,
    length: int,
    *,
    donate: bool = False,
) -> Callable[[Any, Piece], Any]:
    """Compiles `steps.train_epoch` or `steps.eval_epoch`, the batches shared by the devices.

    Args:
        epoch: called as `epoch(carried, images, labels, rows, axis_name=...)`.
        mesh: the devices.
        carried: the epoch's first argument, which may be abstract.
        loader: of the data.
        batch_size: examples a step, of all devices together.
        steps: steps of the epoch.
        length: steps of a piece; the last one may have fewer.
        donate: whether `carried` may be overwritten.

    Returns:
        A function of `carried` and a piece.
    """
    shared, split = PartitionSpec(), PartitionSpec(None, AXIS)
    specs = (shared, shared, shared, split)
    compiled = jax.jit(
        jax.shard_map(partial(epoch, axis_name=AXIS), mesh=mesh, in_specs=specs, out_specs=shared),
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
        out_shardings=replicated(mesh),
        donate_argnums=0 if donate else (),
    )
    filling = -batch_size % mesh.size
    by_length = {
        n: compiled.lower(carried, *loader.abstract(n, batch_size + filling)).compile()
        for n in {length, steps % length} - {0}
    }

    def run(carried: Any, piece: Piece) -> Any:
        # Every device gets as many rows; what fills them up is masked.
        rows = np.pad(piece.rows, ((0, 0), (0, filling)), constant_values=-1)
        return by_length[len(rows)](carried, piece.images, piece.labels, rows)

    return run


def _mesh(devices: list[jax.Device]) -> Mesh:
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _make_cores_devices(count: int) -> None:
    if count == 1 or jax.config.jax_num_cpu_devices != -1 or not _cpu_only():
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return
    if jax.__version_info__ < (0, 11):
        # Otherwise each device splits its operations among all cores. Later versions have a pool
        # of threads for each device, which this would shrink to one thread for all.
        os.environ.setdefault("NPROC", "1")


def _cpu_devices(config: ConfigDict) -> int:
    cores = environment.cores()
    if config.parallel:
        return min(config.parallel, cores)
    return max(1, min(cores, config.batch_size // _LEAST_EXAMPLES))


def _cpu_only() -> bool:
    """Whether JAX will compute on CPU, as far as can be told without starting it."""
    platforms = jax.config.jax_platforms
    if platforms:
        return platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins")
