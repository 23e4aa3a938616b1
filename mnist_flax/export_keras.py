"""Writes a trained network as a Keras file: python -m mnist_flax.export_keras RUN_DIR FILE

FILE ends in .keras, .h5 (for `keras.models.load_model`) or .weights.h5 (for `load_weights`).
Neither Keras nor TensorFlow is needed. The model takes images in [0, 1] and gives probabilities;
it is not compiled, and computes in float32, whatever the run was trained with.
"""

from pathlib import Path

import numpy as np

from mnist_flax import cli, files, keras_files, keras_layers, trained
from mnist_flax.errors import UserError
from mnist_flax.trained import Trained


def main() -> None:
    parser = cli.run_parser("mnist_flax.export_keras", __doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="a new file")
    args = parser.parse_args()
    _check_path(args.file)
    run = trained.load(args.run_dir, args.step, args.seed)
    export_file(run, args.file)
    print(f"{args.file} holds {run.config.model} after step {run.step:,}; in Python:")
    if args.file.name.endswith(".weights.h5"):
        print(f"  model.load_weights({str(args.file)!r})  # a model with the same layers")
    else:
        print(f"  model = keras.models.load_model({str(args.file)!r})")


def export_file(run: Trained, path: Path) -> None:
    """Writes the network of a run as a Keras file, in the format of the file's suffix.

    Raises:
        UserError: the suffix is none of Keras's, or the file exists or cannot be written.
    """
    _check_path(path)
    nodes = keras_layers.nodes_of(run.model)
    config, names = keras_layers.config_of(nodes, run.image_shape)
    linen_names = keras_layers.linen_names(nodes)
    layers = [("InputLayer", "input_layer", [])]
    for position in keras_layers.creation_order(nodes):
        arrays = run.variables["params"].get(linen_names.get(position), {})
        arrays = [np.asarray(arrays[key]) for key in ("kernel", "bias") if key in arrays]
        layers.append((nodes[position].kind, names[position], arrays))
    keras_files.write(path, config, layers)


def _check_path(path: Path) -> None:
    """Refuses a file that `export_file` would not write.

    Raises:
        UserError: the suffix is none of Keras's, or the file exists.
    """
    if not path.name.endswith(keras_files.SUFFIXES):
        raise UserError(f"{path} must end in {', '.join(keras_files.SUFFIXES)}")
    try:
        exists = files.exists(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another") from None
    if exists:
        raise UserError(f"{path} exists: delete it or name another file")


if __name__ == "__main__":
    cli.run(main)
