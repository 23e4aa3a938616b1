"""Keras's files without Keras: legacy HDF5 (.h5), .weights.h5 and .keras."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from mnist_flax import files, hdf5_reader, keras_layers
from mnist_flax.errors import UserError

SUFFIXES = (".keras", ".weights.h5", ".h5")

_SIGNATURES = (b"\x89HDF\r\n\x1a\n", b"PK\x03\x04")
_MAX_SECONDS, _MAX_CHARACTERS = 60, 800
# Of the files that are written; Keras reads its own of any version.
_KERAS_VERSION = "3.0.0"

# Class, name and, where it has any, kernel and bias of each layer, in Keras's order.
Layers = list[tuple[str, str, list[np.ndarray]]]


class Array(NamedTuple):
    """An array of a file: float32, or why it was not read."""

    shape: tuple[int, ...]
    values: np.ndarray | None
    problem: str | None


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        network: the network that its configuration describes; None in a file of weights only.
        weights: arrays of each layer that has any: in the order of `network.nodes`, and without
            a network in Keras's order.
        dropouts: without a network, the number of dropout layers.
        pools: without a network, the number of pooling layers; None where the file does not say.
    """

    network: keras_layers.Described | None
    weights: list[list[Array]]
    dropouts: int
    pools: int | None


def read(path: Path) -> Content:
    """Reads what Keras 2 or 3 saved: a model or its weights.

    Raises:
        UserError: the file is not there, is damaged or none of Keras's.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            # To open a pipe would wait for a writer.
            raise UserError(f"{path} is no file: name one")
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): name a file, .h5, .keras or .weights.h5"
        ) from None
    if not start.startswith(_SIGNATURES):
        raise UserError(
            f"{path} is neither an HDF5 nor a .keras file, as which Keras saves a model: save it "
            "as .h5, .keras or .weights.h5"
        )
    with as_user_error(path):
        return _content(_read_apart(path))


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """Turns whatever a file's content leads to into one sentence.

    Raises:
        UserError: of a `UserError` in the block, with the file's name; and of damage.
    """
    try:
        yield
        return
    except UserError as error:
        start, reason, end = "cannot be taken: ", str(error), ""
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        start, reason = "is damaged or was not written by Keras (", str(error) or repr(error)
        end = "): save the model again"
    except MemoryError:
        start, reason, end = "cannot be taken: ", "it takes more memory than is free", ""
    except RecursionError:
        start, reason = "is damaged or was not written by Keras (", "it nests too deeply"
        end = "): save the model again"
    # The file may have written it.
    reason = "".join(c if c.isprintable() else "?" for c in reason)
    raise UserError(f"{path} {start}{reason[:_MAX_CHARACTERS]}{end}")


def write(path: Path, config: keras_layers.Config, layers: Layers) -> None:
    """Writes a model as the file's suffix says: .keras, .weights.h5 or .h5.

    Args:
        path: the file, which appears when it is whole.
        config: as `keras_layers.config_of` gives it.
        layers: float32 arrays, named as in `config`.

    Raises:
        UserError: the file cannot be written.
    """
    # In memory first, as the HDF5 library crashes on a full disk.
    memory = io.BytesIO()
    if path.name.endswith(".keras"):
        _write_keras(memory, config, layers)
    else:
        with h5py.File(memory, "w") as file:
            if path.name.endswith(".weights.h5"):
                _write_weights(file, layers)
            else:
                _write_legacy(file, config, layers)
    try:
        files.replace(path, lambda file: file.write(memory.getbuffer()))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another") from None


def _read_apart(path: Path) -> dict[str, np.ndarray]:
    """The archive that `hdf5_reader` makes of a file.

    Raises:
        MemoryError: there is not enough for it.
        UserError: it is larger, or takes longer, than any of the seven networks.
        ValueError: it did not come to an end.
    """
    command = [sys.executable, "-P", hdf5_reader.__file__, str(path.absolute())]
    # OpenBLAS takes memory for every thread.
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    try:
        reader = subprocess.run(command, capture_output=True, timeout=_MAX_SECONDS, env=env)
    except subprocess.TimeoutExpired:
        raise UserError(f"reading it did not end in {_MAX_SECONDS} s") from None
    lines = reader.stderr.decode(errors="replace").splitlines() if reader.returncode > 0 else []
    reason = lines[-1] if lines else "the HDF5 library crashed on it"
    # Without memory the system kills it.
    if reader.returncode in (hdf5_reader.NO_MEMORY, -signal.SIGKILL):
        raise MemoryError
    if reader.returncode == hdf5_reader.TOO_LARGE:
        raise UserError(reason)
    if reader.returncode:
        raise ValueError(reason)
    with np.load(io.BytesIO(reader.stdout), allow_pickle=False) as archive:
        return dict(archive)


def _content(archive: dict[str, np.ndarray]) -> Content:
    found = json.loads(str(archive["content"]))

    def array(entry: dict) -> Array:
        values = archive.get(entry["key"])
        values = None if values is None else values.astype(np.float32, copy=False)
        return Array(tuple(entry["shape"]), values, entry["problem"])

    layers = {name: [array(entry) for entry in entries] for name, entries in found["layers"]}
    if found["config"] is None:
        dropouts, pools = _count(layers, "dropout"), None
        numbered = found["named"] == "numbered"
        if foreign := keras_layers.foreign(layers, numbered):
            raise UserError(
                f"it has layers that none of the seven networks has: {', '.join(foreign)}"
            )
        if numbered:
            # Layers without weights are all there, or none is.
            if not all(layers.values()):
                pools = _count(layers, "max_pooling2d")
            # The convolutions come first, in each of the seven networks.
            layers = dict(sorted(layers.items(), key=lambda item: item[0].startswith("dense")))
            return Content(None, [arrays for arrays in layers.values() if arrays], dropouts, pools)
        # A model within the model is one layer: kernel and bias of each of its layers in turn.
        arrays = [array for of_layer in layers.values() for array in of_layer]
        pairs = [arrays[i : i + 2] for i in range(0, len(arrays), 2)]
        return Content(None, pairs, dropouts, pools)
    network = keras_layers.describe(json.loads(found["config"]))
    if found["named"] == "numbered":
        layers = _by_own_name(layers, network.order)
    ordered = [layers.get(name, []) for name in network.names]
    return Content(network, [arrays for arrays in ordered if arrays], 0, None)


def _count(layers: dict[str, list[Array]], kind: str) -> int:
    return sum(name.startswith(kind) for name in layers)


def _by_own_name(
    layers: dict[str, list[Array]], order: list[tuple[str, str]]
) -> dict[str, list[Array]]:
    """Layers with weights by their names in the configuration, instead of class and number."""
    # By rank: Keras 2.12 and 2.13 count each layer twice.
    ranked: dict[str, list[list[Array]]] = defaultdict(list)
    for numbered, arrays in layers.items():
        if arrays:
            ranked[re.sub(r"_\d+$", "", numbered)].append(arrays)
    own: dict[str, list[str]] = defaultdict(list)
    for name, kind in order:
        own[keras_layers.numbered([kind])[0]].append(name)
    return {
        name: arrays
        for kind, found in ranked.items()
        if len(found) == len(own[kind])
        for name, arrays in zip(own[kind], found, strict=True)
    }


def _write_keras(target: io.BytesIO, config: keras_layers.Config, layers: Layers) -> None:
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        _write_weights(file, layers)
    # Where Keras looks for the classes.
    inner = config["config"]
    inner = inner | {"layers": [layer | {"module": "keras.layers"} for layer in inner["layers"]]}
    config = config | {"module": "keras", "config": inner}
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": _KERAS_VERSION}))
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", memory.getvalue())


def _write_weights(file: h5py.File, layers: Layers) -> None:
    # Keras 2 asks for the group of every layer, and of the model.
    file.create_group("vars")
    numbered = keras_layers.numbered(kind for kind, *_ in layers)
    for name, (_, _, arrays) in zip(numbered, layers, strict=True):
        group = file.create_group(f"layers/{name}/vars")
        for number, array in enumerate(arrays):
            group[str(number)] = array


def _write_legacy(file: h5py.File, config: keras_layers.Config, layers: Layers) -> None:
    # In bytes, as Keras writes texts: older ones decode them whatever they are.
    file.attrs["model_config"] = json.dumps(config).encode()
    weights = file.create_group("model_weights")
    for attributes in (file.attrs, weights.attrs):
        attributes["keras_version"] = _KERAS_VERSION.encode()
        # Older versions mirror the kernels of a file of any other backend.
        attributes["backend"] = b"tensorflow"
    weights.attrs["layer_names"] = [name.encode() for _, name, _ in layers]
    for _, name, arrays in layers:
        group = weights.create_group(name)
        paths = [f"{name}/kernel", f"{name}/bias"][: len(arrays)]
        group.attrs["weight_names"] = [path.encode() for path in paths]
        for path, array in zip(paths, arrays, strict=True):
            group[path] = array
