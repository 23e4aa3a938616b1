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


def sources(
    builder: tfds.core.DatasetBuilder, selected: list[tuple[str, int, int]]
) -> tuple[list[Sequence[dict[str, Any]]], str, str]:
    """Random access to the (split, start, stop) selected, and the keys of image and label.

    Raises:
      UserError: the data set is prepared in a format that TFDS cannot read at random.
    """
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if formats == {"tfrecord"}:
        raise UserError(
            f"{builder.name} is prepared as TFRecord, which cannot be streamed in any order: set "
            "data.loader=resident, or prepare it with file_format='array_record'"
        )
    image_key, label_key = builders.feature_keys(builder)
    try:
        with builders.quiet():
            wanted = [builder.as_data_source(f"{part}[{a}:{b}]") for part, a, b in selected]
    except Exception as error:
        raise _unreadable(builder, str(selected[0][0]), error) from error
    return wanted, image_key, label_key


def _stack(builder: tfds.core.DatasetBuilder, split: str) -> tuple[np.ndarray, np.ndarray]:
    image_key, label_key = builders.feature_keys(builder)
    size = builder.info.splits[split].num_examples
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if formats == {"tfrecord"}:
        examples = _tfrecord_examples(builder, split)
    else:
        examples = iter(builder.as_data_source(split))
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
