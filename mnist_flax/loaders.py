"""How examples reach the device: all of them at once, or streamed a piece at a time.

A loader has `size`, the number of its examples, `image_shape`, (H, W, C), and `most`, the number
of examples that it can bring at once. `pieces` yields what a number of steps needs, and
`abstract` the shapes of such a piece, to compile for. The same rows give the same batches from
either loader, so that training is bit for bit the same.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from mnist_flax import datasets, environment
from mnist_flax.datasets import Arrays, Examples
from mnist_flax.errors import UserError

NAMES = ("resident", "stream")
_STREAMED_BYTES = 64 * 2**20


class Piece(NamedTuple):
    """Arguments of `steps.train_epoch` and `steps.eval_epoch`.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: int32 [N].
        rows: int32 [steps, B], indices into both; -1 is padding.
    """

    images: jax.Array
    labels: jax.Array
    rows: jax.Array | np.ndarray


class Resident:
    """A whole data set on each device, once, as uint8; a piece is nothing but indices."""

    def __init__(self, arrays: Arrays, sharding: Sharding):
        self._arrays = jax.device_put(arrays, sharding)
        self.size, self.image_shape = len(arrays.labels), arrays.images.shape[1:]
        # It brings indices only.
        self.most = sys.maxsize

    def pieces(self, rows: np.ndarray, length: int) -> Iterator[Piece]:
        """The steps of `rows`, int32 [steps, B], in pieces of at most `length`."""
        for start in range(0, len(rows), length):
            yield Piece(*self._arrays, rows[start : start + length])

    def abstract(self, steps: int, batch_size: int) -> Piece:
        return Piece(*self._arrays, jax.ShapeDtypeStruct((steps, batch_size), jnp.int32))


class Streamed:
    """Examples that are read, decoded and sent, by Grain, while the device works.

    A few pieces of at most 64 MiB are held at a time, whatever the size of the data set.
    """

    def __init__(self, examples: Examples, sharding: Sharding):
        self._examples, self._sharding = examples, sharding
        self.size, self.image_shape = len(examples), examples.image_shape
        self.most = max(1, _STREAMED_BYTES // int(np.prod(self.image_shape)))

    def pieces(self, rows: np.ndarray, length: int) -> Iterator[Piece]:
        """The steps of `rows`, int32 [steps, B], in pieces of at most `length`."""
        # Here, as a run with resident data does not need it.
        import grain

        parts = [rows[start : start + length] for start in range(0, len(rows), length)]
        pipeline = (
            grain.MapDataset.source(_Chosen(self._examples, rows.ravel()))
            .to_iter_dataset()
            .batch(length * rows.shape[1], batch_fn=_stack)
        )
        pipeline = grain.experimental.device_put(
            pipeline, self._sharding, cpu_buffer_size=1, device_buffer_size=1
        )
        for part, (images, labels) in zip(parts, pipeline, strict=True):
            positions = np.arange(part.size, dtype=np.int32).reshape(part.shape)
            yield Piece(images, labels, np.where(part < 0, -1, positions))

    def abstract(self, steps: int, batch_size: int) -> Piece:
        examples = steps * batch_size
        return Piece(
            jax.ShapeDtypeStruct((examples, *self.image_shape), jnp.uint8),
            jax.ShapeDtypeStruct((examples,), jnp.int32),
            jax.ShapeDtypeStruct((steps, batch_size), jnp.int32),
        )


Loader = Resident | Streamed


def create(loader: str, name: str, split: str, manual_dir: str, sharding: Sharding) -> Loader:
    """The loader, one of `NAMES`, of a slice of a data set.

    Args:
        loader: `resident` or `stream`.
        name, split, manual_dir: as `datasets.load` takes them.
        sharding: which devices get the examples: each gets all.

    Raises:
        UserError: the data cannot be had, or does not fit into memory.
    """
    if loader == "stream":
        return Streamed(datasets.open_slice(name, split, manual_dir), sharding)
    _check_memory(name, split, manual_dir, len(sharding.device_set))
    return Resident(datasets.load(name, split, manual_dir), sharding)


def _check_memory(name: str, split: str, manual_dir: str, copies: int) -> None:
    """Refuses a split that does not fit, before it is read.

    Raises:
        UserError: it takes more memory than a device, or this machine, has free.
    """
    given, read = datasets.image_bytes(name, split, manual_dir)
    host, device = environment.free_memory()
    needs = [("this machine", read, host), (environment.device_name(), given, device)]
    if device is None:
        # On CPU all copies lie in one memory.
        needs = [("this machine", read + copies * given, host)]
    for memory, needed, free in needs:
        if needed > free:
            raise UserError(
                f"the images of {name} need {needed / 2**30:.1f} GiB, and {memory} has "
                f"{free / 2**30:.1f} GiB free: set data.loader=stream"
            )


class _Chosen(Sequence):
    """Examples in the order of `indices`; -1 gives any, as it is masked."""

    def __init__(self, examples: Examples, indices: np.ndarray):
        self._examples, self._indices = examples, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._examples[max(0, self._indices[index])]


def _stack(examples: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*examples, strict=True)
    return np.stack(images), np.array(labels, np.int32)
