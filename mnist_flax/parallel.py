"""Devices that share each batch, or deal the seeds out; on CPU every core can be such a device.

XLA's CPU client gives one operation at a time to all cores. A device for each core, with one
thread and its own share of the batch, keeps what it computes in that core's cache, and waits for
the others once a step, where the gradients are summed.
"""

import importlib.metadata
import math
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

SEEDS, AXIS = "seeds", "devices"

# Fewer examples than this leave a core more work with the gradients' sum than with the examples.
_LEAST_EXAMPLES = 16


def mesh(config: ConfigDict) -> Mesh:
    """The devices that train: rows for different seeds, in each of which devices share batches.

    Called before JAX's first computation, it makes devices of CPU cores; later, and where the
    number of CPU devices was set already, it takes of those that there are.

    Raises:
        UserError: there are fewer than `config.parallel`.
    """
    cores = environment.cores()
    _make_cores_devices(min(cores, math.prod(_shape(config, cores))))
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    shape = _shape(config, min(cores, len(devices)) if on_cpu else 1)
    if (count := math.prod(shape)) > len(devices):
        raise UserError(
            f"parallel={count} asks for more devices than there are: {len(devices)} "
            f"({environment.device_name()}); 0 takes what pays"
        )
    return _mesh(devices[:count], shape)


def single_mesh() -> Mesh:
    """The first device alone."""
    return _mesh(jax.devices()[:1], (1, 1))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has: the data set, the state of one seed."""
    return NamedSharding(mesh, PartitionSpec())


def dealt_out(mesh: Mesh) -> NamedSharding:
    """The sharding of what has a leading axis of seeds."""
    return NamedSharding(mesh, PartitionSpec(SEEDS))


def compile_epoch(
    epoch: Callable,
    mesh: Mesh,
    carried: Any,
    loader: Loader,
    batch_size: int,
    steps: int,
    length: int,
    *,
    seeds: int = 1,
    donate: bool = False,
) -> Callable[[Any, Piece], Any]:
    """Compiles `steps.train_epoch` or `steps.eval_epoch` for the devices of a mesh.

    With several seeds `carried` and the result have a leading axis of seeds, and a row holds a
    batch of each seed.

    Args:
        epoch: called as `epoch(carried, images, labels, rows, axis_name=...)`.
        mesh: the devices.
        carried: the epoch's first argument, which may be abstract.
        loader: of the data.
        batch_size: examples a step of one seed, on all devices together.
        steps: steps of the epoch.
        length: steps of a piece; the last one may have fewer.
        seeds: the number of seeds.
        donate: whether `carried` may be overwritten.

    Returns:
        A function of `carried` and a piece.
    """
    shared, several = PartitionSpec(), seeds > 1
    # No axis for a device alone: what is summed over one device XLA copies and fuses with nothing.
    # It tells where one batch is all that there is to do, not where seeds take turns.
    axis = AXIS if several or mesh.shape[AXIS] > 1 else ()
    state = PartitionSpec(SEEDS) if several else shared
    split = PartitionSpec(None, SEEDS, axis) if several else PartitionSpec(None, axis)
    specs = (state, shared, shared, split)
    epoch = partial(epoch, axis_name=axis)
    compiled = jax.jit(
        jax.shard_map(
            partial(_each_seed, epoch) if several else epoch,
            mesh=mesh,
            in_specs=specs,
            out_specs=state,
            # The epoch does not know that seeds differ.
            check_vma=not several,
        ),
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
        out_shardings=NamedSharding(mesh, state),
        donate_argnums=0 if donate else (),
    )

    def divided(rows: np.ndarray) -> np.ndarray:
        """Every device gets as many examples of a seed; what fills them up is masked."""
        rows = rows.reshape(len(rows), *([seeds] if several else []), batch_size)
        filling = [(0, 0)] * (rows.ndim - 1) + [(0, -batch_size % mesh.shape[AXIS])]
        return np.pad(rows, filling, constant_values=-1)

    by_length = {}
    for n in {length, steps % length} - {0}:
        piece = loader.abstract(n, seeds * batch_size)
        rows = divided(np.zeros(piece.rows.shape, np.int32))
        by_length[n] = compiled.lower(carried, piece.images, piece.labels, rows).compile()

    def run(carried: Any, piece: Piece) -> Any:
        rows = divided(piece.rows)
        return by_length[len(rows)](carried, piece.images, piece.labels, rows)

    return run


def _each_seed(epoch: Callable, carried: Any, images: Any, labels: Any, rows: jax.Array) -> Any:
    """`epoch` of every seed on this device: at once, or on CPU one after the other.

    There, products with a leading axis of seeds are slower than one after the other, by a third
    where convolutions are wide.
    """

    def one(own: tuple[Any, jax.Array]) -> Any:
        return epoch(own[0], images, labels, own[1])

    return jax.lax.platform_dependent(
        (carried, rows.swapaxes(0, 1)), cpu=partial(jax.lax.map, one), default=jax.vmap(one)
    )


def _mesh(devices: list[jax.Device], shape: tuple[int, int]) -> Mesh:
    return Mesh(np.array(devices).reshape(shape), (SEEDS, AXIS), axis_types=(AxisType.Auto,) * 2)


def _shape(config: ConfigDict, devices: int) -> tuple[int, int]:
    """Of so many devices, how many to share the seeds and each batch."""
    if config.parallel:
        rows = math.gcd(config.num_seeds, config.parallel)
        return rows, config.parallel // rows
    rows = math.gcd(config.num_seeds, devices)
    return rows, max(1, min(devices // rows, config.batch_size // _LEAST_EXAMPLES))


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


def _cpu_only() -> bool:
    """Whether JAX will compute on CPU, as far as can be told without starting it."""
    platforms = jax.config.jax_platforms
    if platforms:
        return platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins")
