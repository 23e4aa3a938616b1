"""Decoding the examples of a prepared data set, without TensorFlow."""

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mnist_flax import builders
from mnist_flax.errors import UserError

# Examples that are decoded in one call. A call for each takes TFDS three times as long; all in one
# would take many times the memory of the images, in TFDS's objects.
_AT_ONCE = 256


class Examples:
    """Examples on disk, read and decoded each time they are asked for.

    Attributes:
        image_shape: (H, W, C) of the first; another in a later one is an error then.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, parts: list[tuple[Sequence, int, int]]):
        """Of each data source what lies between start and stop, one part after the other."""
        self._builder, self._keys = builder, builders.feature_keys(builder)
        self._sources = [source for source, _, _ in parts]
        self._firsts = [start for _, start, _ in parts]
        self._starts = np.cumsum([0, *(stop - start for _, start, stop in parts)])
        ((image, _),) = self._decoded(0, self._firsts[:1])
        self.image_shape = image.shape

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The examples at `indices`, int [N], in that order.

        Returns:
            images uint8 [N, H, W, C] and labels int32 [N].

        Raises:
            UserError: one of them cannot be read, has an image of another size or has no label.
        """
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        source_of = np.searchsorted(self._starts, indices, side="right") - 1
        for source in np.unique(source_of):
            places = np.flatnonzero(source_of == source)
            for some in np.split(places, range(_AT_ONCE, len(places), _AT_ONCE)):
                within = indices[some] - self._starts[source] + self._firsts[source]
                decoded = self._decoded(source, within.tolist())
                for place, (image, label) in zip(some, decoded, strict=True):
                    if image.shape != self.image_shape:
                        raise UserError(
                            f"the images of {self._builder.name} differ in size "
                            f"({self.image_shape} and {image.shape}): take a data set of images "
                            "of one size"
                        )
                    if label < 0:
                        raise UserError(
                            f"an example of {self._builder.name} has no label: take another split"
                        )
                    images[place], labels[place] = image, label
        return images, labels

    def _decoded(self, source: int, within: list[int]) -> list[tuple[np.ndarray, int]]:
        try:
            examples = self._sources[source].__getitems__(within)
        except Exception as error:
            raise _unreadable(self._builder, error) from error
        return [tuple(example[key] for key in self._keys) for example in examples]


def decode(builder: tfds.core.DatasetBuilder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a whole split of a prepared data set, in the order that TFDS's slices count.

    Returns:
        images uint8 [N, H, W, C] and labels int32 [N].

    Raises:
        UserError: images of several sizes, examples without a label, damaged files.
    """
    size = builder.info.splits[split].num_examples
    with builders.quiet():
        return examples(builder, [(split, 0, size)]).read(np.arange(size))


def examples(builder: tfds.core.DatasetBuilder, selected: list[tuple[str, int, int]]) -> Examples:
    """Random access to the (split, start, stop) selected of a prepared data set.

    Raises:
        UserError: its files are damaged or need a package that is not installed.
    """
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    # Whole splits, as TFDS takes all of a shard of Parquet for a slice of it.
    open_split = _TFRecords if formats == {"tfrecord"} else tfds.core.DatasetBuilder.as_data_source
    try:
        with builders.quiet():
            sources = {split: open_split(builder, split) for split, _, _ in selected}
        for split, source in sources.items():
            if len(source) != (expected := builder.info.splits[split].num_examples):
                raise ValueError(f"{len(source)} examples found where {expected} are expected")
    except Exception as error:
        raise _unreadable(builder, error) from error
    return Examples(builder, [(sources[split], start, stop) for split, start, stop in selected])


def _unreadable(builder: tfds.core.DatasetBuilder, error: Exception) -> UserError:
    missing = builders.missing_package(error)
    again = f"try again, or delete {builder.data_dir} to prepare it anew"
    remedy = f"install {missing}" if missing else again
    return UserError(f"{builder.name} cannot be read ({builders.short(error)}): {remedy}")


class _TFRecords:
    """A data source of TFRecord, the format of a plain `tfds.load`, as TFDS's needs TensorFlow.

    It counts through the shards one after the other, as a slice does, while iterating over a
    tf.data pipeline interleaves them.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self._features = builder.info.features
        self._paths = builder.info.splits[split].filepaths
        places = [
            (shard, *record)
            for shard, path in enumerate(self._paths)
            for record in _records(Path(path))
        ]
        # Of each example its shard, and where it begins there and its length in bytes.
        self._places = np.array(places, np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        places, found = self._places[indices].tolist(), []
        with contextlib.ExitStack() as opened:
            files = {
                shard: opened.enter_context(open(self._paths[shard], "rb"))
                for shard in {shard for shard, *_ in places}
            }
            for shard, begin, length in places:
                files[shard].seek(begin)
                found.append(self._features.deserialize_example_np(files[shard].read(length)))
        return found


def _records(path: Path) -> Iterator[tuple[int, int]]:
    """Where the records of a TFRecord file begin, and their lengths in bytes.

    In the file a record is its length, a CRC of that, its bytes and a CRC of them; the CRCs are not
    checked.
    """
    end = path.stat().st_size
    with path.open("rb") as file:
        while (start := file.tell()) < end:
            length = struct.unpack("<Q4x", file.read(12).ljust(12, b"\xff"))[0]
            if start + length + 16 > end:
                raise ValueError(f"{path.name} is truncated")
            yield start + 12, length
            file.seek(length + 4, os.SEEK_CUR)
