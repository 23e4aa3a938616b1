"""How examples reach the device: all of them at once, or streamed a piece at a time.

The same rows give the same batches from either kind of loader, so that training is bit for bit the
same (but that XLA may round a piece of a single step otherwise).
"""

import math
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mnist_flax import datasets, environment, parallel
from mnist_flax.datasets import Arrays
from mnist_flax.errors import UserError, unknown

if TYPE_CHECKING:
    from mnist_flax.decoding import Examples

NAMES = ("resident", "stream")
_STREAMED_BYTES = 64 * 2**20


class Piece(NamedTuple):
    """What the devices of a mesh need for some steps.

    Attributes:
        images: uint8 [N, H, W, C], the same on every device or each device's own N / devices.
        labels: int32 [N], likewise.
        rows: int32 [steps, seeds, B], split as `parallel.rows_sharding` says, B filled up to a
            multiple of the devices that share a batch; indices into what the device has, -1 is
            padding.
    """

    images: jax.Array
    labels: jax.Array
    rows: jax.Array


class Resident:
    """A whole data set on each device, once, as uint8; a piece is nothing but indices.

    All devices of a CPU share one copy.

    Attributes:
        size: the number of examples.
        image_shape: (H, W, C).
        max_examples: how many a piece may bring.
        shared: whether every device has the same examples.
    """

    shared = True

    def __init__(self, arrays: Arrays, mesh: Mesh):
        if mesh.devices.flat[0].platform == "cpu":
            arrays = Arrays(*map(_aligned, arrays))
        self._arrays, self._mesh = _send(arrays, parallel.replicated_sharding(mesh)), mesh
        self.size, self.image_shape = len(arrays.labels), arrays.images.shape[1:]
        # It brings indices only.
        self.max_examples = sys.maxsize

    def pieces(self, rows: np.ndarray, length: int) -> Iterator[Piece]:
        """The steps of `rows`, int32 [steps, seeds, B], in pieces of at most `length`."""
        for part in _parts(rows, length, self._mesh):
            yield Piece(*self._arrays, _on_devices(part, self._mesh))

    def abstract(self, steps: int, seeds: int, batch_size: int) -> Piece:
        """What a piece of `steps` steps is compiled for; its arrays are those of every piece."""
        return Piece(*self._arrays, _abstract_rows(steps, seeds, batch_size, self._mesh))


class Streamed:
    """Examples that are read, decoded and sent, by Grain, while the devices work.

    A process reads what its own devices need, and a device gets nothing but its share of each
    batch. A few pieces of at most 64 MiB, or of one step, are held at a time, whatever the size of
    the data set. Attributes and methods are those of `Resident`.
    """

    shared = False

    def __init__(self, examples: "Examples", mesh: Mesh):
        self._examples, self._mesh = examples, mesh
        self.size, self.image_shape = len(examples), examples.image_shape
        self.max_examples = max(1, _STREAMED_BYTES // math.prod(self.image_shape))

    def pieces(self, rows: np.ndarray, length: int) -> Iterator[Piece]:
        """The steps of `rows`, int32 [steps, seeds, B], in pieces of at most `length`.

        Raises:
            UserError: an example cannot be read, is of another size, or has no label or one that is
                no class.
        """
        # Here, as a run with resident data does not need it.
        import grain

        mesh, parts = self._mesh, _parts(rows, length, self._mesh)
        needed = [
            np.concatenate([part[i].ravel() for i in _shares(part.shape, mesh, mesh.local_devices)])
            for part in parts
        ]
        # One thread reads, as decoding holds Python's lock, and another sends.
        pipeline = grain.MapDataset.source(needed).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        prefetch = partial(grain.experimental.ThreadPrefetchIterDataset, prefetch_buffer_size=1)
        pipeline = prefetch(pipeline.map(self._read))
        send = partial(_send, sharding=parallel.per_device_sharding(mesh))
        pipeline = prefetch(pipeline.map(send))
        for part, (images, labels) in zip(parts, pipeline, strict=True):
            positions = np.empty_like(part)
            for index in _shares(part.shape, mesh, mesh.devices.flat):
                share = part[index]
                places = np.arange(share.size).reshape(share.shape)
                positions[index] = np.where(share < 0, -1, places)
            yield Piece(images, labels, _on_devices(positions, mesh))

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Padding is any example, as it is masked. What several seeds need is decoded once.
        indices, places = np.unique(np.maximum(indices, 0), return_inverse=True)
        images, labels = self._examples.read(indices)
        return images[places], labels[places]

    def abstract(self, steps: int, seeds: int, batch_size: int) -> Piece:
        """The shapes and dtypes of a piece of `steps` steps."""
        rows = _abstract_rows(steps, seeds, batch_size, self._mesh)
        return Piece(
            jax.ShapeDtypeStruct((rows.size, *self.image_shape), jnp.uint8),
            jax.ShapeDtypeStruct((rows.size,), jnp.int32),
            rows,
        )


Loader = Resident | Streamed


def create(loader: str, name: str, split: str, manual_dir: str, mesh: Mesh) -> Loader:
    """The loader, one of `NAMES`, of a slice of a data set.

    Args:
        loader: `resident` or `stream`.
        name, split, manual_dir: as `datasets.load` takes them.
        mesh: the devices that get the examples.

    Raises:
        UserError: there is no such loader, or the data cannot be had or does not fit into memory.
    """
    if loader == "stream":
        return Streamed(datasets.open_slice(name, split, manual_dir), mesh)
    if loader != "resident":
        raise unknown("loader", loader, NAMES)
    _check_memory(name, split, manual_dir)
    return Resident(datasets.load(name, split, manual_dir), mesh)


def _check_memory(name: str, split: str, manual_dir: str) -> None:
    """Refuses a split that does not fit, before it is read.

    Raises:
        UserError: it takes more memory than a device, or this machine, has free.
    """
    given, read = datasets.image_bytes(name, split, manual_dir)
    host, device = environment.free_memory()
    needs = [("this machine", read, host), (environment.device_name(), given, device)]
    if device is None:
        # On CPU both are in one memory.
        needs = [("this machine", read + given, host)]
    for memory, needed, free in needs:
        if needed > free:
            # A slice is cut of what was read as a whole.
            slice_helps = f", or name a smaller slice than {split}" if read <= host else ""
            raise UserError(
                f"the images of {name} need {needed / 2**30:.1f} GiB, and {memory} has "
                f"{free / 2**30:.1f} GiB free: train with data.loader=stream{slice_helps}"
            )


def _parts(rows: np.ndarray, length: int, mesh: Mesh) -> list[np.ndarray]:
    """Rows of at most `length` steps, padded so that all devices get equal shares of a batch."""
    filling = [(0, 0), (0, 0), (0, -rows.shape[-1] % mesh.shape[parallel.BATCH])]
    rows = np.pad(rows, filling, constant_values=-1)
    return [rows[start : start + length] for start in range(0, len(rows), length)]


def _abstract_rows(steps: int, seeds: int, batch_size: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    batch_size += -batch_size % mesh.shape[parallel.BATCH]
    return jax.ShapeDtypeStruct((steps, seeds, batch_size), jnp.int32)


def _shares(
    shape: tuple[int, ...], mesh: Mesh, devices: Iterable[jax.Device]
) -> list[tuple[slice, ...]]:
    """Where in rows of that shape the devices' shares are."""
    indices = parallel.rows_sharding(mesh).devices_indices_map(shape)
    return [indices[device] for device in devices]


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy aligned to 64 bytes, which a CPU device uses without copying it again."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _send(arrays: tuple[np.ndarray, ...], sharding: NamedSharding) -> tuple[jax.Array, ...]:
    """Arrays of this process to its devices."""
    return tuple(jax.make_array_from_process_local_data(sharding, array) for array in arrays)


def _on_devices(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    return jax.make_array_from_callback(rows.shape, parallel.rows_sharding(mesh), rows.__getitem__)
