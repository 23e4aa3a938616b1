"""Decoding the examples of a prepared data set, without TensorFlow."""

import contextlib
import io
import os
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mnist_flax import builders
from mnist_flax.errors import UserError

# Examples that are decoded in one call. A call for each takes TFDS three times as long; all in one
# would take many times the memory of the images, in TFDS's objects.
_AT_ONCE = 256

# Pillow's, by the number of channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Examples:
    """Examples on disk, read and decoded each time they are asked for.

    Attributes:
        image_shape: (H, W, C) of the first; another in a later one is an error then.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, parts: list[tuple[Sequence, int, int]]):
        """Of each data source what lies between start and stop, one part after the other."""
        self._builder, self._keys = builder, builders.feature_keys(builder)
        image, label = (builder.info.features[key] for key in self._keys)
        self._channels, self._num_classes = image.shape[-1], label.num_classes
        self._sources = [source for source, _, _ in parts]
        self._slice_starts = [start for _, start, _ in parts]
        self._offsets = np.cumsum([0, *(stop - start for _, start, stop in parts)])
        ((image, _),) = self._decoded(0, self._slice_starts[:1])
        self.image_shape = image.shape

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The examples at `indices`, int [N], in that order.

        Returns:
            images uint8 [N, H, W, C] and labels int32 [N].

        Raises:
            UserError: one of them cannot be read, has an image of another size, or has no label
                or one that is no class.
        """
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        source_of = np.searchsorted(self._offsets, indices, side="right") - 1
        for source in np.unique(source_of):
            places = np.flatnonzero(source_of == source)
            for some in np.split(places, range(_AT_ONCE, len(places), _AT_ONCE)):
                within = indices[some] - self._offsets[source] + self._slice_starts[source]
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
                    if label >= self._num_classes:
                        raise UserError(
                            f"an example of {self._builder.name} has the label {label}, and there "
                            f"are {self._num_classes} classes, from 0: have its labels mended"
                        )
                    images[place], labels[place] = image, label
        return images, labels

    def _decoded(self, source: int, within: list[int]) -> list[tuple[np.ndarray, int]]:
        image, label = self._keys
        try:
            return [
                (_pixels(example[image], self._channels), example[label])
                for example in self._sources[source].__getitems__(within)
            ]
        except Exception as error:
            raise _unreadable(self._builder, error) from error


def _pixels(encoded: bytes, channels: int) -> np.ndarray:
    """An image as uint8 [H, W, channels], as TensorFlow's `decode_image` gives it.

    TFDS without TensorFlow would give what the file holds: one bit, an index into a palette, or an
    alpha channel more.

    Raises:
        OSError, ValueError: it is damaged or has pixels of 32 bits.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("an image has pixels of 32 bits")
        pixels = np.asarray(image.convert(_MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


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
    encoded = {builders.feature_keys(builder)[0]: tfds.decode.SkipDecoding()}

    def open_split(split: str) -> Sequence:
        if formats == {"tfrecord"}:
            return _TFRecords(builder, split, encoded)
        # A whole split, as TFDS takes all of a shard of Parquet for a slice of it.
        source = builder.as_data_source(split, decoders=encoded)
        if formats == {"array_record"}:
            # Its length is what the description of the data set says.
            found = sum(_num_records(path) for path in builder.info.splits[split].filepaths)
            _check_count(builder, split, found)
        _check_count(builder, split, len(source))
        return source

    try:
        with builders.quiet():
            sources = {split: open_split(split) for split, _, _ in selected}
    except Exception as error:
        raise _unreadable(builder, error) from error
    return Examples(builder, [(sources[split], start, stop) for split, start, stop in selected])


def _check_count(builder: tfds.core.DatasetBuilder, split: str, found: int) -> None:
    if found != (expected := builder.info.splits[split].num_examples):
        raise ValueError(f"{found} examples found where {expected} are expected")


def _num_records(path: os.PathLike) -> int:
    # Here, as other formats do not need it.
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _unreadable(builder: tfds.core.DatasetBuilder, error: Exception) -> UserError:
    missing = builders.missing_package(error)
    again = "try again, or restore it from where it came"
    if builder.name in ("digits", *builders.MNIST_FAMILY):
        again = f"try again, or delete {builder.data_dir} to prepare it anew"
    remedy = f"install {missing}" if missing else again
    return UserError(f"{builder.name} cannot be read ({builders.short(error)}): {remedy}")


class _TFRecords:
    """A data source of TFRecord, the format of a plain `tfds.load`, as TFDS's needs TensorFlow.

    It counts through the shards one after the other, as a slice does, while iterating over a
    tf.data pipeline interleaves them.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, decoders: dict[str, Any]):
        self._parse = partial(builder.info.features.deserialize_example_np, decoders=decoders)
        self._paths = builder.info.splits[split].filepaths
        # Of each shard where its records begin, and their lengths in bytes: 16 bytes a record.
        self._places = [
            np.fromiter(chain.from_iterable(_records(Path(path))), np.int64).reshape(-1, 2)
            for path in self._paths
        ]
        self._offsets = np.cumsum([0, *map(len, self._places)])
        _check_count(builder, split, int(self._offsets[-1]))

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        shards = (np.searchsorted(self._offsets, indices, side="right") - 1).tolist()
        found = []
        with contextlib.ExitStack() as opened:
            files = {
                shard: opened.enter_context(open(self._paths[shard], "rb")) for shard in set(shards)
            }
            for index, shard in zip(indices, shards, strict=True):
                begin, length = self._places[shard][index - self._offsets[shard]].tolist()
                files[shard].seek(begin)
                found.append(self._parse(files[shard].read(length)))
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
