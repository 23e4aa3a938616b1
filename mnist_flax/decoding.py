"""Decoding the splits of a prepared data set, without TensorFlow."""

import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mnist_flax import builders
from mnist_flax.errors import UserError

# Examples that TFDS decodes in one call. A call for each takes three times as long; all in one
# would take many times the memory of the images, in TFDS's objects.
_AT_ONCE = 256


class Examples:
    """Examples on disk, read and decoded each time they are asked for.

    Attributes:
        image_shape: (H, W, C) of the first; another in a later one is an error then.
    """

    def __init__(self, sources: list[Sequence], image_key: str, label_key: str):
        self._sources, self._keys = sources, (image_key, label_key)
        self._starts = np.cumsum([0, *map(len, sources)])
        ((image, _),) = self._decoded(0, [0])
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
                within = indices[some] - self._starts[source]
                decoded = self._decoded(source, within.tolist())
                for place, (image, label) in zip(some, decoded, strict=True):
                    if image.shape != self.image_shape:
                        raise UserError(
                            f"the images differ in size ({self.image_shape} and {image.shape}): "
                            "take a data set of images of one size"
                        )
                    if label < 0:
                        raise UserError("an example has no label: take another split")
                    images[place], labels[place] = image, label
        return images, labels

    def _decoded(self, source: int, within: list[int]) -> list[tuple[np.ndarray, int]]:
        try:
            examples = self._sources[source].__getitems__(within)
        except Exception as error:
            raise UserError(
                f"an example cannot be read ({error}): try again, or delete the data set to "
                "prepare it anew"
            ) from error
        return [tuple(example[key] for key in self._keys) for example in examples]


def decode(builder: tfds.core.DatasetBuilder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a whole split of a prepared data set, in the order that TFDS's slices count.

    Returns:
        images uint8 [N, H, W, C] and labels int32 [N].

    Raises:
        UserError: images of several sizes, examples without a label, damaged files.
    """
    try:
        with builders.quiet():
            images, labels = _stack(builder, split)
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(builder, split, error) from error
    if labels.min() < 0:
        raise UserError(f"the split {split!r} of {builder.name} has no labels: take another split")
    return images, labels


def _unreadable(builder: tfds.core.DatasetBuilder, split: str, error: Exception) -> UserError:
    missing = builders.missing_package(error)
    remedy = f"install {missing}" if missing else f"delete {builder.data_dir} to prepare anew"
    return UserError(
        f"the split {split!r} of {builder.name} cannot be read ({builders.short(error)}): {remedy}"
    )


def examples(builder: tfds.core.DatasetBuilder, selected: list[tuple[str, int, int]]) -> Examples:
    """Random access to the (split, start, stop) selected.

    Raises:
        UserError: the data set is prepared in a format that TFDS cannot read at random.
    """
    if _is_tfrecord(builder):
        raise UserError(
            f"{builder.name} is prepared as TFRecord, which cannot be streamed in any order: set "
            "data.loader=resident, or prepare it with file_format='array_record'"
        )
    try:
        with builders.quiet():
            sources = [builder.as_data_source(f"{part}[{a}:{b}]") for part, a, b in selected]
    except Exception as error:
        raise _unreadable(builder, str(selected[0][0]), error) from error
    return Examples(sources, *builders.feature_keys(builder))


def _is_tfrecord(builder: tfds.core.DatasetBuilder) -> bool:
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    return formats == {"tfrecord"}


def _stack(builder: tfds.core.DatasetBuilder, split: str) -> tuple[np.ndarray, np.ndarray]:
    image_key, label_key = builders.feature_keys(builder)
    size = builder.info.splits[split].num_examples
    if _is_tfrecord(builder):
        examples = _tfrecord_examples(builder, split)
    else:
        examples = _in_order(builder.as_data_source(split))
    first = next(examples)
    images = np.empty((size, *first[image_key].shape), np.uint8)
    labels = np.empty(size, np.int32)
    count = 0
    for example in itertools.chain([first], examples):
        image = example[image_key]
        if image.shape != images.shape[1:]:
            raise UserError(
                f"the images of {builder.name} differ in size ({images.shape[1:]} and "
                f"{image.shape}): take a data set of images of one size"
            )
        images[count], labels[count] = image, example[label_key]
        count += 1
    if count != size:
        raise ValueError(f"{count} examples found where {size} are expected")
    return images, labels


def _in_order(source: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(source), _AT_ONCE):
        yield from source.__getitems__([*range(start, min(start + _AT_ONCE, len(source)))])


def _tfrecord_examples(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[dict[str, Any]]:
    """Reads TFRecord, the format of a plain `tfds.load`, which TFDS reads by TensorFlow alone.

    A slice counts through the shards one after the other, while iterating over a tf.data
    pipeline interleaves them.
    """
    for path in builder.info.splits[split].filepaths:
        for record in _tfrecords(Path(path)):
            yield builder.info.features.deserialize_example_np(record)


def _tfrecords(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length, CRC of it, bytes, CRC of them; not checking CRCs."""
    end = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < end:
            length = struct.unpack("<Q4x", file.read(12).ljust(12, b"\xff"))[0]
            if file.tell() + length + 4 > end:
                raise ValueError(f"{path.name} is truncated")
            yield file.read(length)
            file.seek(4, os.SEEK_CUR)
