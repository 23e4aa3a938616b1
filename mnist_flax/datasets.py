"""Image classification data sets as NumPy arrays, through TensorFlow Datasets (TFDS).

`digits` is embedded, `mnist`, `fashion_mnist` and `kmnist` are prepared without TensorFlow, and
any other TFDS image classification set is read where it is prepared, or prepared if TFDS needs no
TensorFlow for it. Data lies in the folder that TFDS uses: TFDS_DATA_DIR, or else
~/tensorflow_datasets.
"""

import hashlib
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mnist_flax import files
from mnist_flax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

    from mnist_flax import decoding


# The version of what `_read_cache` reads: raise it when examples are decoded otherwise.
_FORMAT = 2


class Arrays(NamedTuple):
    """Examples in memory."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]


def check_name(name: str) -> None:
    """Raises UserError unless there is such a data set, for image classification."""
    _builder(name)


def check_split(name: str, split: str) -> None:
    """Checks a slice of a data set before anything is prepared or read.

    Of a set whose splits are known only once it is prepared, only the slice's form is checked.

    Raises:
        UserError: an unknown data set or split, a malformed slice, or one that selects nothing.
    """
    from mnist_flax import builders

    builders.resolve(_builder(name), split)


def prepare(name: str, splits: Iterable[str], manual_dir: str = "") -> None:
    """Prepares a data set where that has not been done, and checks slices of it.

    Raises:
        UserError: as `load`, but for what shows when examples are read.
    """
    from mnist_flax import builders

    first, *others = splits
    builder, _ = _prepared(name, first, manual_dir)
    for split in others:
        builders.resolve(builder, split)


def overlap(name: str, split: str, other: str) -> bool:
    """Whether two slices of a prepared data set have an example in common.

    Raises:
        UserError: as `check_split` does.
    """
    from mnist_flax import builders

    builder = _builder(name)
    return any(
        part == other_part and max(start, other_start) < min(stop, other_stop)
        for part, start, stop in builders.resolve(builder, split)
        for other_part, other_start, other_stop in builders.resolve(builder, other)
    )


def num_classes(name: str) -> int:
    """The number of classes of a data set.

    Raises:
        UserError: as `check_name` does.
    """
    from mnist_flax import builders

    builder = _builder(name)
    return builder.info.features[builders.feature_keys(builder)[1]].num_classes


def load(name: str, split: str, manual_dir: str = "") -> Arrays:
    """Loads a slice of a data set, preparing it first where that has not been done.

    Args:
        name: `digits`, `mnist`, `fashion_mnist`, `kmnist` or another TFDS name, such as
          `cifar10` or `emnist/balanced`.
        split: a TFDS slice: `train`, `train[5000:]`, `train[90%:]`, `train[:10%]+train[80%:]`.
        manual_dir: a folder with the four .gz files of the MNIST family, for preparing without a
          network; without it MNIST_FLAX_MANUAL_DIR. Not looked at once the set is prepared.

    Returns:
        images uint8 [N, H, W, C] and labels int32 [N], in TFDS's order.

    Raises:
        UserError: what `check_split` finds; a set that can be neither found, downloaded nor
          prepared; files that are damaged, or need a package that is not installed; a wrong or
          missing file in `manual_dir`; images of several sizes, without a label or with one
          that is no class.
    """
    builder, selected = _prepared(name, split, manual_dir)
    wholes = {part: _whole_split(builder, part) for part in {part for part, _, _ in selected}}
    parts = [
        Arrays(wholes[part].images[start:stop], wholes[part].labels[start:stop])
        for part, start, stop in selected
    ]
    if len({part.images.shape[1:] for part in parts}) > 1:
        raise UserError(f"the images of {name} differ in size: take splits of one size")
    if len(parts) == 1:
        return parts[0]
    return Arrays(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def open_slice(name: str, split: str, manual_dir: str = "") -> "decoding.Examples":
    """As `load`, but examples are read and decoded only when they are asked for.

    Raises:
        UserError: as `load`, but of the sizes of images only the first's is known yet.
    """
    from mnist_flax import decoding

    return decoding.examples(*_prepared(name, split, manual_dir))


def image_bytes(name: str, split: str, manual_dir: str = "") -> tuple[int, int]:
    """Bytes of images that `load` needs memory for; prepares the data set as it does.

    Returns:
        Those of the slice, and those of the whole splits that are read to cut it from. Where a data
        set does not declare the size of its images they are taken to be of the first one's.

    Raises:
        UserError: as `load`.
    """
    from mnist_flax import builders

    builder, selected = _prepared(name, split, manual_dir)
    shape = builder.info.features[builders.feature_keys(builder)[0]].shape
    if None in shape:
        shape = open_slice(name, split, manual_dir).image_shape
    each = math.prod(shape)
    given = sum(stop - start for _, start, stop in selected)
    read = sum(builder.info.splits[part].num_examples for part in {part for part, *_ in selected})
    return given * each, read * each


def _builder(name: str) -> "tfds.core.DatasetBuilder":
    from mnist_flax import builders

    return builders.create(name, _data_dir())


def _prepared(
    name: str, split: str, manual_dir: str
) -> tuple["tfds.core.DatasetBuilder", list[tuple[str, int, int]]]:
    """The builder of a data set that is prepared, now or before, and what a slice selects of it."""
    from mnist_flax import builders

    builder = _builder(name)
    # Refuses a wrong slice before anything is prepared.
    builders.resolve(builder, split)
    in_family = builders.is_mnist_family(name)
    if manual_dir and not in_family:
        raise UserError(
            f"data.manual_dir is for {', '.join(builders.MNIST_FAMILY)}, not for {name}: "
            "leave it empty"
        )
    if not builder.info.splits:
        from mnist_flax import preparation

        folder = manual_dir or (in_family and os.environ.get("MNIST_FLAX_MANUAL_DIR"))
        folder = files.local(folder) if folder else None
        builder = preparation.prepare(name, builder, folder)
    return builder, builders.resolve(builder, split)


def _data_dir() -> Path:
    return files.local(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _whole_split(builder: "tfds.core.DatasetBuilder", split: str) -> Arrays:
    """A whole split, decoded once and then read from `mnist_flax_cache` in the data folder."""
    full_name = builder.info.full_name.replace("/", "-")
    # Not builder.data_dir_root, which is the set's own folder where TFDS knows it by that alone.
    folder = _data_dir() / "mnist_flax_cache" / full_name
    source = _fingerprint(builder, split)
    arrays = _read_cache(folder, split, source)
    if arrays is None:
        from mnist_flax import decoding

        arrays = Arrays(*decoding.decode(builder, split))
        _write_cache(folder, split, source, arrays)
    return arrays


def _fingerprint(builder: "tfds.core.DatasetBuilder", split: str) -> str:
    """Changes when the data set is prepared again or a file of the split is written again."""
    path = Path(builder.data_dir) / "dataset_info.json"
    found = hashlib.sha256(path.read_bytes())
    for file in (path, *map(Path, builder.info.splits[split].filepaths)):
        # What is missing is said where it is read.
        if os.path.exists(file):
            status = file.stat()
            found.update(f"{file.name} {status.st_size} {status.st_mtime_ns} ".encode())
    return f"{_FORMAT} {found.hexdigest()}"


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data)


def _read_cache(folder: Path, split: str, source: str) -> Arrays | None:
    """The cached split; None where there is none, or it is out of date or damaged."""
    record_path = folder / f"{split}.json"
    # Unlike `Path.exists`, for a folder of somebody else's it says no.
    if not os.path.exists(record_path):
        return None
    try:
        record = json.loads(record_path.read_text())
        if record["source"] != source:
            return None
        # Read rather than mapped: it takes 20 ms, and a file cut short cannot kill the run later.
        arrays = Arrays(*(np.load(folder / f"{split}_{kind}.npy") for kind in Arrays._fields))
        if record["checksums"] != [_checksum(array) for array in arrays]:
            raise ValueError("wrong checksum")
        return arrays
    except Exception as error:
        # NumPy raises whatever a damaged header leads to, MemoryError and TokenError among it.
        warnings.warn(f"decoding again, as the cache {folder} is damaged: {error}", stacklevel=2)
        return None


def _write_cache(folder: Path, split: str, source: str, arrays: Arrays) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, array in arrays._asdict().items():
            files.replace(folder / f"{split}_{kind}.npy", partial(np.save, arr=array))
        # Last, as it vouches for the other two.
        record = {"source": source, "checksums": [_checksum(array) for array in arrays]}
        files.replace_text(folder / f"{split}.json", json.dumps(record))
    except OSError as error:
        warnings.warn(
            f"decoded images are not kept, so that every run decodes them again: {error}",
            stacklevel=2,
        )
