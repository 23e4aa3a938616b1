"""Reads the arrays of a Keras file in a process of its own; `keras_files.read` starts it.

The HDF5 library may loop or crash on a damaged file. It then takes no other work with it.

    python hdf5_reader.py FILE

writes an .npz archive to the standard output: `content`, a JSON text that `read` describes, and
the arrays. Nothing in the file is executed, unpickled or followed out of it.
"""

import contextlib
import io
import json
import os
import re
import resource
import sys
import zipfile
from collections.abc import Iterable
from typing import Any

import h5py
import numpy as np

# More than any of the seven networks takes with its optimiser on images of up to 100×100.
_MAX_BYTES = 2**30
# Keras does not compress, and trained weights cannot be compressed far.
_MAX_EXPANSION = 10
_MAX_CONFIG_BYTES = 2**20
_MAX_ARRAYS = 1000
_MAX_CONTENT_BYTES = 2**22
_MAX_MEMORY = 2**32

# Exit codes.
TOO_LARGE, NO_MEMORY = 3, 4


class TooLarge(ValueError):
    """What a file holds may be sound, and is more than is read."""


def main() -> None:
    # Not on every system.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    try:
        content, arrays = read(sys.argv[1])
        if len(text := json.dumps(content)) > _MAX_CONTENT_BYTES:
            raise ValueError(f"its names take {len(text):,} bytes")
    except MemoryError:
        sys.exit(NO_MEMORY)
    except TooLarge as error:
        print(error, file=sys.stderr)
        sys.exit(TOO_LARGE)
    except Exception as error:
        # The library raises whatever the damage leads to.
        sys.exit((str(error).strip() or type(error).__name__).splitlines()[0][:200])
    np.savez(sys.stdout.buffer, content=np.array(text), **arrays)


def read(path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a file holds.

    Returns:
        `{"config": JSON text or None, "named": ..., "layers": ...}`, and the arrays by key.
        "named" is "own" where layers go by their own names and "numbered" where they go by class
        and number. "layers" lists all layers in the file's order as [name, arrays], an array as
        {"shape": ..., "key": ..., "problem": why it was not read, or None}.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        with zipfile.ZipFile(path) as archive:
            config = _member(archive, "config.json", _MAX_CONFIG_BYTES).decode()
            weights = io.BytesIO(_member(archive, "model.weights.h5", _MAX_BYTES))
        size = weights.getbuffer().nbytes
        with h5py.File(weights, "r") as file:
            return _content(config, "numbered", _numbered(file), size)
    size = os.path.getsize(path)
    with h5py.File(path, "r") as file:
        if "model_config" in file.attrs:
            config = _texts(file, "model_config")[0]
            layers = _legacy(_member_of(file, "model_weights", h5py.Group))
            return _content(config, "own", layers, size)
        if "layer_names" in file.attrs:
            return _content(None, "own", _legacy(file), size)
        return _content(None, "numbered", _numbered(file), size)


Layers = Iterable[tuple[str, list[h5py.Dataset]]]


def _content(config: str | None, named: str, layers: Layers, size: int):
    # Arrays that are stored as a whole cannot take more than their file, unless several are one.
    most = min(size, _MAX_BYTES)
    arrays, described, opened, total = {}, [], 0, 0
    for name, datasets in layers:
        opened += len(datasets)
        if opened > _MAX_ARRAYS:
            raise ValueError(f"its layers name more than {_MAX_ARRAYS:,} arrays")
        entries = []
        for dataset in datasets:
            key = f"array{len(arrays)}"
            problem = _problem(dataset)
            total += 0 if problem else dataset.nbytes
            if total > most:
                error = TooLarge if most == _MAX_BYTES else ValueError
                raise error(f"its arrays take more than {most:,} bytes")
            if problem is None:
                arrays[key] = dataset[()]
            entries.append({"shape": dataset.shape, "key": key, "problem": problem})
        described.append((name, entries))
    return {"config": config, "named": named, "layers": described}, arrays


def _problem(dataset: h5py.Dataset) -> str | None:
    if dataset.dtype.newbyteorder("=") not in (np.float16, np.float32):
        # HDF5 has no bfloat16: Keras stores it as two bytes.
        kind = "bfloat16" if dataset.dtype == "V2" else dataset.dtype
        return f"{dataset.name} is {kind}: have the model's weights in float32 and save it again"
    # Keras writes arrays as a whole. The other layouts may name further files, load a decoder or
    # unpack to any size.
    whole = dataset.id.get_storage_size() == dataset.nbytes
    if dataset.chunks or dataset.is_virtual or dataset.external or not whole:
        return f"{dataset.name} is not stored as Keras stores it: load it there and save it again"
    if dataset.file.attrs.get("backend") in ("theano", b"theano"):
        return "Theano mirrors kernels: load it in Keras 2 on TensorFlow and save it again"
    return None


def _legacy(group: h5py.Group) -> Layers:
    """Layers that the attribute `layer_names` names in their order."""
    for name in _texts(group, "layer_names"):
        layer = _member_of(group, name, h5py.Group)
        paths = _texts(layer, "weight_names")
        yield name, _weights(_member_of(layer, path, h5py.Dataset) for path in paths)


def _numbered(file: h5py.File) -> Layers:
    """Layers that are called by class and number, those of a class in their order."""
    # Keras 2.12 and 2.13 called the group by its internal name.
    places = ("layers", "_layer_checkpoint_dependencies")
    layers = {}
    for place in places:
        if place in file:
            group = _member_of(file, place, h5py.Group)
            layers |= {name: (group, name) for name in group}
    # Keras 2 on Windows wrote paths with its own separator, which is none to HDF5.
    for path in file:
        place, _, name = path.partition("\\")
        if place in places and name:
            layers[name] = (file, path)
    for name in sorted(layers, key=lambda name: int((re.findall(r"_(\d+)$", name) or [0])[0])):
        group = _member_of(*layers[name], h5py.Group)
        variables = _member_of(group, "vars", h5py.Group)
        yield name, _weights(_member_of(variables, key, h5py.Dataset) for key in sorted(variables))


def _weights(datasets: Iterable[h5py.Dataset]) -> list[h5py.Dataset]:
    # Dropout may keep the state of its random generator, two whole numbers.
    return [d for d in datasets if not (d.dtype.kind in "iu" and d.shape == (2,))]


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > most:
        raise TooLarge(f"{name} in it unpacks to {info.file_size:,} bytes, and {most:,} are read")
    if info.file_size > _MAX_EXPANSION * info.compress_size + _MAX_CONFIG_BYTES:
        raise ValueError(f"{name} in it unpacks to {info.file_size:,} bytes")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The decoders of the others unpack without a limit.
        raise ValueError(f"{name} in it is compressed as Keras does not")
    with archive.open(info) as file:
        # Told how much, it unpacks no more, whatever the compressed data says.
        return file.read(info.file_size)


def _member_of(parent: h5py.Group, path: str, kind: type) -> Any:
    """A member, at a path of hard links, as other links may lead to further files."""
    found = parent
    for part in path.split("/"):
        if not isinstance(found.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{path} is missing in {parent.name}")
        found = found[part]
    if not isinstance(found, kind):
        raise TypeError(f"{found.name} is no {kind.__name__.lower()}")
    return found


def _texts(parent: h5py.Group, name: str) -> list[str]:
    """The attribute's texts, be it one or several."""
    if (entries := parent.attrs.get_id(name).get_space().get_simple_extent_npoints()) > 1000:
        raise ValueError(f"the attribute {name} has {entries:,} entries")
    texts = np.ravel(parent.attrs[name])
    if (length := sum(map(len, texts))) > _MAX_CONFIG_BYTES:
        raise ValueError(f"the attribute {name} takes {length:,} bytes")
    return [text.decode() if isinstance(text, bytes) else str(text) for text in texts]


if __name__ == "__main__":
    main()
