"""Makes a run folder of a file that Keras saved: python -m mnist_flax.import_keras FILE RUN_DIR

FILE is .h5, .weights.h5 or .keras, of Keras 2 or 3, and holds one of the seven networks. Neither
Keras nor TensorFlow is needed, and nothing in the file is executed.
"""

import os
import re
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mnist_flax import (
    checkpoint,
    cli,
    datasets,
    environment,
    files,
    keras_files,
    keras_layers,
    models,
    optim,
    parallel,
    report,
    rundir,
)
from mnist_flax import config as config_lib
from mnist_flax.errors import UserError
from mnist_flax.keras_files import Content
from mnist_flax.position import Position
from mnist_flax.state import TrainState, root_key


def main() -> None:
    parser = cli.parser("mnist_flax.import_keras", __doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="what Keras saved")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a new or empty folder")
    parser.add_argument(
        "--model", help=f"the network, where the file leaves it open: {', '.join(models.names())}"
    )
    parser.add_argument(
        "--dataset", default="mnist", help="what `evaluate` scores it on (default: %(default)s)"
    )
    args = parser.parse_args()
    config, described = import_file(args.file, args.run_dir, args.model, args.dataset)
    print(f"{args.file} holds {config.model}; its weights are in the run folder {args.run_dir}")
    if not described:
        print(
            "It holds weights alone: that activations, pools and the order of channels are those "
            f"of {config.model}, for images of 28×28, is taken for granted"
        )
    report.next_steps(args.run_dir)


def import_file(
    path: Path, run_dir: str | Path, name: str | None = None, dataset: str = "mnist"
) -> tuple[ConfigDict, bool]:
    """Makes a run folder, at step 0, with the weights of a Keras file.

    Args:
        path: a file that `keras.Model.save` or `save_weights` wrote.
        run_dir: the run folder: new or empty.
        name: the network; without it, the file says.
        dataset: the data set that `evaluate` takes.

    Returns:
        The run's configuration, and whether the file describes the network; otherwise it holds
        weights alone, whose shapes are those of that network.

    Raises:
        UserError: the file is damaged, holds none of the seven networks or leaves open which, or
            the folder is in use. Nothing is written then.
    """
    if name is not None:
        models.create(name)
    datasets.check_name(dataset)
    run_dir = files.local(run_dir)
    _check_folder(run_dir)
    # For its UserError: without a device JAX would fail later, with a traceback.
    parallel.devices()
    content = keras_files.read(path)
    with keras_files.as_user_error(path):
        name, model, image_shape = recognise(content, name)
        params = params_of(content, model, image_shape)

    config = config_lib.recipe(name, dataset, model=name)
    config_lib.validate(config)
    state = TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        opt_state=optim.without_schedule(config.optimizer).init(params),
        batch_stats={},
        key=jax.random.key_data(root_key(config.seed)),
    )
    record = {
        "image_shape": image_shape,
        "num_classes": model.num_classes,
        "config": config.to_dict(),
        "versions": environment.versions(),
        "position": Position().record(),
    }
    # A link stays, and what it leads to is replaced.
    run_dir = Path(os.path.realpath(run_dir))
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        # Elsewhere until it is whole.
        with tempfile.TemporaryDirectory(
            prefix=f".{run_dir.name}.", suffix=".tmp", dir=run_dir.parent
        ) as temporary:
            unfinished = Path(temporary, run_dir.name)
            unfinished.mkdir()
            rundir.write_config(unfinished, config)
            with checkpoint.open_manager(rundir.checkpoints(unfinished)) as manager:
                checkpoint.save(manager, state, record)
            # Where the folder of checkpoints has its name, and then the run's.
            files.sync_names(unfinished)
            os.replace(unfinished, run_dir)
            files.sync_names(run_dir.parent)
    except OSError as error:
        raise UserError(
            f"{run_dir} cannot be written ({error.strerror}): name another folder"
        ) from None
    return config, content.network is not None


def _check_folder(run_dir: Path) -> None:
    try:
        in_use = files.exists(run_dir) and (not run_dir.is_dir() or any(run_dir.iterdir()))
        # Its place is taken by another folder.
        current = os.path.realpath(run_dir) == os.getcwd()
    except OSError as error:
        raise UserError(f"{run_dir} cannot be used ({error.strerror}): name another") from None
    if in_use or current:
        is_what = "is in use" if in_use else "is the current folder"
        raise UserError(f"{run_dir} {is_what}: name a new or an empty folder")


def recognise(content: Content, name: str | None) -> tuple[str, nn.Module, tuple[int, ...]]:
    """Which of the seven networks a file holds, its module, and the shape of its images.

    A file of weights only, which does not tell, is taken to be of 28×28 images.

    Args:
        content: of the file.
        name: the only network to consider, whatever its dropout; without it all are.

    Raises:
        UserError: it is none of them, is not the one named, or may be several.
    """
    arrays = [array for layer in content.weights for array in layer]
    if content.network:
        last = re.fullmatch(r"Dense (\d{1,6}) softmax", content.network.nodes[-1].text)
        num_classes = int(last[1]) if last else 1
    elif arrays and len(arrays[0].shape) == 4:
        num_classes = max((1, *arrays[-1].shape[-1:]))
    else:
        raise UserError(f"its network is none of {', '.join(models.names())}: {_found(content)}")
    candidates = {n: models.create(n, num_classes=num_classes) for n in models.names()}
    alike = [n for n, model in candidates.items() if _fits(content, model, any_dropout=True)]
    if name in alike:
        return name, candidates[name], _image_shape(content)
    fitting = [n for n in alike if _fits(content, candidates[n], any_dropout=False)]
    if name or not alike:
        wanted = f"not {name}" if name else f"none of {', '.join(candidates)}"
        known = f" but {' or '.join(alike)}" if alike else ""
        raise UserError(f"its network is {wanted}{known}: {_found(content)}")
    if len(fitting) != 1:
        raise UserError(
            f"its network is {' or '.join(fitting or alike)}, but for its dropout: say which with "
            "--model"
        )
    return fitting[0], candidates[fitting[0]], _image_shape(content)


def params_of(
    content: Content, model: nn.Module, image_shape: tuple[int, ...]
) -> dict[str, dict[str, np.ndarray]]:
    """The parameters of `model`, float32, from a file that `recognise` found to hold it.

    Raises:
        UserError: an array is missing, of another shape, or not as Keras writes it.
    """
    shapes = _shapes(model, image_shape)
    layers = _layers(content, model)
    for array in chain.from_iterable(content.weights):
        if array.problem:
            raise UserError(array.problem)
    if [len(arrays) for arrays in content.weights] != [2] * len(layers):
        raise UserError(
            "its weights are not those of its layers, a kernel and a bias each: save the model "
            "again, and not quantised"
        )
    params = {}
    for layer, arrays in zip(layers, content.weights, strict=True):
        params[layer] = {}
        for key, array in zip(("kernel", "bias"), arrays, strict=True):
            if array.shape != (shape := shapes[layer][key].shape):
                raise UserError(f"the {key} of {layer} has the shape {array.shape}, not {shape}")
            if not np.isfinite(array.values).all():
                raise UserError(f"the {key} of {layer} has numbers that are NaN or infinite")
            params[layer][key] = array.values
    return params


def _fits(content: Content, model: nn.Module, any_dropout: bool) -> bool:
    nodes = keras_layers.nodes_of(model)
    if content.network:
        found = content.network.nodes
        if any_dropout:
            nodes, found = (keras_layers.without_dropout(n) for n in (nodes, found))
        return nodes == found
    kinds = Counter(node.kind for node in nodes)
    if content.dropouts != kinds["Dropout"] and not any_dropout:
        return False
    if content.pools not in (None, kinds["MaxPooling2D"]):
        return False
    try:
        shapes = _shapes(model, _image_shape(content))
    except UserError:
        return False
    expected = [
        [shapes[layer][key].shape for key in ("kernel", "bias")]
        for layer in _layers(content, model)
    ]
    return expected == [[array.shape for array in arrays] for arrays in content.weights]


def _image_shape(content: Content) -> tuple[int, ...]:
    if content.network and content.network.image_shape:
        return content.network.image_shape
    return (28, 28, *content.weights[0][0].shape[2:3]) if content.weights else (28, 28, 1)


def _layers(content: Content, model: nn.Module) -> list[str]:
    """Linen's names of the layers with weights, in the order of `content.weights`."""
    nodes = keras_layers.nodes_of(model)
    order = range(len(nodes)) if content.network else keras_layers.creation_order(nodes)
    names = keras_layers.linen_names(nodes)
    return [names[position] for position in order if position in names]


def _shapes(model: nn.Module, image_shape: tuple[int, ...]) -> Any:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def _found(content: Content) -> str:
    if content.network:
        return f"it has {', '.join(node.text for node in content.network.nodes)}"
    shapes = (array.shape for arrays in content.weights for array in arrays)
    arrays = ", ".join("×".join(map(str, shape)) for shape in shapes)
    if not arrays:
        return "it has no layer with weights, as Sequential and Functional models have them"
    pools = "" if content.pools is None else f"{content.pools} MaxPooling2D and "
    return f"it has {pools}arrays of {arrays}; weights alone are taken to be of images of 28×28"


if __name__ == "__main__":
    cli.run(main)
