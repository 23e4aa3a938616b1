"""TensorFlow Datasets without TensorFlow: which data set, and its splits.

Kept apart from `datasets.py` because importing TFDS takes most of a second, which
`--help`, a mistyped flag or a user of the networks alone should not pay.
"""

import contextlib
import difflib
import functools
import gzip
import io
import logging
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mnist_flax import files
from mnist_flax.errors import UserError, nearest

MNIST_FAMILY = ("mnist", "fashion_mnist", "kmnist")
IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
GZ_NAMES = tuple(name for pair in IDX_FILES.values() for name in pair)

_STDOUT = threading.RLock()

tfds.disable_progress_bar()
# TFDS recommends packages that are not needed here.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno >= logging.ERROR or "tensorflow_datasets" not in record.pathname
)


def _read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file as uint8, [N, H, W] for images and [N] for labels."""
    with gzip.open(path) as file:
        data = file.read()
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


@functools.cache
def _idx_builder_class(name: str) -> type[tfds.core.GeneratorBasedBuilder]:
    """TFDS's own builder of the MNIST family, with the two steps replaced that need TensorFlow.

    Those are unpacking the .gz files and encoding the images. Keys and features stay, so that
    TFDS writes the same examples in the same order and the stock builder reads the result.
    """
    stock = tfds.builder_cls(name)

    def split_generators(self, dl_manager):
        paths = dl_manager.download({file: urljoin(stock.URL, file) for file in GZ_NAMES})
        return {
            split: self._generate_examples(paths[images], paths[labels])
            for split, (images, labels) in IDX_FILES.items()
        }

    def generate_examples(self, images_path, labels_path):
        pairs = zip(_read_idx(images_path), _read_idx(labels_path), strict=True)
        for index, (image, label) in enumerate(pairs):
            yield index, {"image": Image.fromarray(image), "label": int(label)}

    body = {
        "_split_generators": split_generators,
        "_generate_examples": generate_examples,
        "SPLIT_SIZES": {"train": 60_000, "test": 10_000},
        # TFDS finds the checksums of the four files beside the module of the class.
        "__module__": stock.__module__,
    }
    with tfds.core.registered.skip_registration():
        return type(stock.__name__, (stock,), body)


def _like_mnist(image: np.ndarray) -> Image.Image:
    """Values 0..16, [8, 8], as MNIST shows a digit: 20x20 pixels in the middle of 28x28."""
    small = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
    canvas = Image.new("L", (28, 28))
    canvas.paste(small.resize((20, 20), Image.Resampling.BICUBIC), (4, 4))
    return canvas


with tfds.core.registered.skip_registration():

    class Digits(tfds.core.GeneratorBasedBuilder):
        """The 1,797 handwritten digits of scikit-learn, in MNIST's format, without a download.

        `train` is the first 1,500 and `test` the last 297, both in the order of the file.
        """

        VERSION = tfds.core.Version("1.0.0")
        SPLIT_SIZES = {"train": 1_500, "test": 297}

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description="8x8 digits of the UCI optical recognition test set, as 28x28 images.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(28, 28, 1)),
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                ),
                supervised_keys=("image", "label"),
                homepage="https://archive.ics.uci.edu/dataset/80",
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            first_test = self.SPLIT_SIZES["train"]
            return {
                "train": self._generate_examples(slice(None, first_test)),
                "test": self._generate_examples(slice(first_test, None)),
            }

        def _generate_examples(self, part: slice):
            # Only preparing needs scikit-learn, and it takes a second to import.
            from sklearn.datasets import load_digits

            digits = load_digits()
            pairs = zip(digits.images[part], digits.target[part], strict=True)
            for index, (image, label) in enumerate(pairs):
                yield index, {"image": _like_mnist(image), "label": int(label)}


def is_mnist_family(name: str) -> bool:
    """Whether it is a set of the MNIST family, in the version that is prepared here."""
    return _own_builder_class(name) is not None


def _own_builder_class(name: str) -> type[tfds.core.GeneratorBasedBuilder] | None:
    base, _, version = name.partition(":")
    if base not in MNIST_FAMILY:
        return None
    own = _idx_builder_class(base)
    return own if version in ("", str(own.VERSION)) else None


def create(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """The builder of a data set, prepared or not; reads `data_dir`, never the network.

    Raises:
        UserError: no such data set, or one that is not for image classification.
    """
    try:
        # Another colon would ask for a namespace, which TFDS looks up on the network.
        form = r"[a-z0-9_]+(/[\w.-]+)?(:\d+\.\d+\.\d+)?"
        if not isinstance(name, str) or not re.fullmatch(form, name):
            raise tfds.core.registered.DatasetNotFoundError
        # Otherwise DatasetInfo looks into a bucket that TFDS has switched off, and leaves a folder
        # in /tmp.
        info, asks_bucket = tfds.core.DatasetInfo, "initialize_from_bucket"
        with quiet(), tfds.core.utils.temporary_assignment(info, asks_bucket, lambda self: None):
            if name == "digits":
                builder = Digits(data_dir=data_dir)
            elif (own := _own_builder_class(name)) is not None:
                builder = own(data_dir=data_dir)
            else:
                builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        raise UserError(_unknown_name(name)) from None
    except Exception as error:
        if isinstance(error, ValueError) and "/" in name:
            raise UserError(_unknown_name(name)) from None
        raise UserError(explain(name, "open", error)) from error
    feature_keys(builder)
    return builder


def _unknown_name(name: object) -> str:
    ours = ("digits", *MNIST_FAMILY)
    known = [*ours, *tfds.list_builders(with_community_datasets=False)]
    base = str(name).partition("/")[0]
    if base in known and base not in ours:
        known += [f"{base}/{config}" for config in tfds.builder_cls(base).builder_configs]
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"take {', '.join(ours)} or one of TFDS's"
    return f"there is no data set {name!r}: {hint}"


def feature_keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """The names of the image and of the label in an example.

    Raises:
        UserError: the data set has no 8-bit image with a class label.
    """
    features = builder.info.features
    keys = builder.info.supervised_keys or ("image", "label")
    if len(keys) == 2 and all(isinstance(key, str) and key in features for key in keys):
        image, label = (features[key] for key in keys)
        if (
            isinstance(image, tfds.features.Image)
            and isinstance(label, tfds.features.ClassLabel)
            and image.np_dtype == np.uint8
        ):
            return keys
    raise UserError(
        f"the data set {builder.name!r} is not for image classification: it needs an 8-bit image "
        f"and a class label, and has {', '.join(features)}; take mnist or digits, say"
    )


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the data set is there by now, which `builder` may be too old to know."""
    # Not builder.is_prepared(), which warns where there is nothing yet.
    return (Path(builder.data_dir) / "dataset_info.json").is_file()


def splits(builder: tfds.core.DatasetBuilder) -> dict[str, tfds.core.SplitInfo]:
    """The splits by name; empty where they are known only once the data set is prepared."""
    if builder.info.splits:
        return dict(builder.info.splits)
    return {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
        for name, size in getattr(builder, "SPLIT_SIZES", {}).items()
    }


def resolve(builder: tfds.core.DatasetBuilder, split: str) -> list[tuple[str, int, int]]:
    """What a TFDS slice selects, as (split, start, stop) in the order it is written.

    Only the form is checked, and nothing selected, where the splits are not known yet.

    Raises:
        UserError: an unknown split, a malformed slice, or one that selects nothing.
    """
    known = splits(builder)
    try:
        instruction = tfds.core.ReadInstruction.from_spec(split)
    except (ValueError, NotImplementedError):
        reason = "it is malformed or goes beyond 100%"
        raise UserError(_bad_split(builder, split, reason)) from None
    try:
        parts = instruction.to_absolute(known) if known else []
    except ValueError as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        if unknown := re.match(r"Unknown split '(\w+)'", reason):
            reason += f", the nearest is {nearest(unknown[1], known)!r}"
        raise UserError(_bad_split(builder, split, reason)) from None
    sizes = {name: found.num_examples for name, found in known.items()}
    selected = [
        (part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to)
        for part in parts
    ]
    if any(start >= stop for _, start, stop in selected):
        raise UserError(_bad_split(builder, split, "it selects no examples"))
    return selected


def _bad_split(builder: tfds.core.DatasetBuilder, split: object, reason: str) -> str:
    known = splits(builder)
    sizes = " and ".join(f"{name} ({info.num_examples:,} examples)" for name, info in known.items())
    return (
        f"the split {split!r} of {builder.name} cannot be used: {reason}; "
        + (f"its splits are {sizes}, and " if known else "")
        + "a slice is written like train[5000:], train[90%:] or train[:10%]+train[80%:]"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS from announcing on stdout what it does."""
    # Of two threads the later one to leave would leave it so.
    with _STDOUT, contextlib.redirect_stdout(io.StringIO()):
        yield


def explain(name: str, doing: str, error: Exception) -> str:
    """Why TFDS could not do something with a data set, and what to do."""
    missing = missing_package(error)
    if missing == "tensorflow":
        return (
            f"TFDS needs TensorFlow to {doing} {name}: prepare it where TensorFlow is installed, "
            "then set TFDS_DATA_DIR to the folder that holds it"
        )
    if missing:
        return f"TFDS needs the Python package {missing!r} to {doing} {name}: install it"
    reason = short(error)
    if files.is_full(reason):
        return f"TFDS cannot {doing} {name} ({reason}): make room there and start again"
    return (
        f"TFDS cannot {doing} {name} ({reason}): prepare it with TFDS by itself, "
        "then set TFDS_DATA_DIR to the folder that holds it"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def missing_package(error: BaseException) -> str | None:
    """The package whose absence is behind an error."""
    names = [e.name for e in _causes(error) if isinstance(e, ModuleNotFoundError) and e.name]
    return names[0].partition(".")[0] if names else None


def short(error: BaseException) -> str:
    """The first line of the innermost cause, which says most in fewest words."""
    *_, innermost = _causes(error)
    text = getattr(innermost, "strerror", None) or str(innermost).strip()
    return text.splitlines()[0].rstrip(".: ") if text else type(innermost).__name__
