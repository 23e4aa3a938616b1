"""Keras's files without Keras; real Keras reads what is written where it is installed."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from PIL import Image

from mnist_flax import config as config_lib
from mnist_flax import (
    datasets,
    evaluate,
    export_keras,
    files,
    hdf5_reader,
    import_keras,
    keras_files,
    keras_layers,
    models,
    parts,
    predict,
    rundir,
    steps,
    train,
    trained,
)
from mnist_flax.errors import UserError
from tests.helpers import quick_jit, random_state, random_variables, uniform

# Written by Keras 2 (tf_keras 2.21), 2.13 and 3 (3.15.1): `larger` for images of 12×12 with the
# weights of `fixture_params`, and the configurations of two more networks.
FOLDER = Path(__file__).parent / "keras_files"
FILES = [
    "larger_keras2.h5",
    "larger_keras3.h5",
    "larger_keras3.keras",
    "larger_keras213.keras",
]


@pytest.mark.parametrize("version", ["keras2", "keras3"])
def test_layers_are_made_in_the_order_of_keras(version):
    theirs = keras_layers.describe(json.loads((FOLDER / f"branched_{version}.json").read_text()))
    ours = [theirs.names[i] for i in keras_layers.creation_order(theirs.nodes)]
    assert ours == [name for name, kind in theirs.order if kind != "InputLayer"]


@pytest.fixture
def read_here(monkeypatch):
    """Reads files in this process, as a new one for each takes most of the time."""

    def read(path):
        try:
            content, arrays = hdf5_reader.read(str(path))
        except Exception as error:
            raise ValueError(str(error)) from error
        return {"content": np.array(json.dumps(content)), **arrays}

    monkeypatch.setattr(keras_files, "_read_apart", read)


def fixture_params():
    rng = np.random.default_rng(0)
    shapes = [(5, 5, 1, 30), (3, 3, 30, 15), (15, 128), (128, 50), (50, 10)]
    names = ["Conv_0", "Conv_1", "Dense_0", "Dense_1", "Dense_2"]
    return {
        name: {
            key: rng.standard_normal(s).astype(np.float32) / 10
            for key, s in (("kernel", shape), ("bias", shape[-1:]))
        }
        for name, shape in zip(names, shapes, strict=True)
    }


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def loaded(name, image_shape=(28, 28, 1), **overrides):
    """A run with random weights."""
    model = models.create(name, **overrides)
    variables = random_variables(model, image_shape)
    state = jax.tree.map(np.asarray, variables["params"])
    config = config_lib.recipe(name, "digits", model=name)
    return trained.Trained(config, model, {"params": state, "batch_stats": {}}, 0, image_shape)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_keras_becomes_a_run(file, tmp_path):
    config, described = import_keras.import_file(FOLDER / file, tmp_path / "run")
    assert config.model == "larger" and described
    run = trained.load(tmp_path / "run")
    assert run.image_shape == (12, 12, 1) and run.step == 0
    assert_equal(run.variables["params"], fixture_params())


@pytest.mark.parametrize("version", ["keras2", "keras3"])
@pytest.mark.parametrize("name", ["branched", "single_conv_5x5"])
def test_a_configuration_of_keras_is_recognised(name, version):
    config = json.loads((FOLDER / f"{name}_{version}.json").read_text())
    found = keras_layers.describe(config)
    assert found.nodes == keras_layers.nodes_of(models.create(name))
    # The second takes rows of 784 numbers and reshapes them.
    assert found.image_shape == (28, 28, 1)


@pytest.mark.usefixtures("read_here")
@pytest.mark.parametrize("suffix", keras_files.SUFFIXES)
@pytest.mark.parametrize("name", models.names())
def test_what_is_exported_is_imported_bit_for_bit(name, suffix, tmp_path):
    run = loaded(name)
    export_keras.export_file(run, tmp_path / f"model{suffix}")
    content = keras_files.read(tmp_path / f"model{suffix}")
    found, model, image_shape = import_keras.recognise(content, None)
    params = import_keras.params_of(content, model, image_shape)
    assert (found, model, image_shape) == (name, run.model, (28, 28, 1))
    assert_equal(params, run.variables["params"])


def test_texts_of_an_exported_h5_are_bytes_as_keras_writes_them(tmp_path):
    # Older versions decode them, which text of Unicode has no need of.
    export_keras.export_file(loaded("convnet"), tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5") as file:
        weights = file["model_weights"]
        texts = [(group.attrs, "weight_names") for group in weights.values()]
        texts += [(file.attrs, "model_config"), (weights.attrs, "layer_names")]
        for attributes in (file.attrs, weights.attrs):
            texts += [(attributes, "backend"), (attributes, "keras_version")]
            # They mirror the kernels of any backend but their own.
            assert attributes["backend"] == "tensorflow"
        for attributes, name in texts:
            dtype = attributes.get_id(name).dtype
            # An empty list has none.
            assert dtype.kind == "f" or h5py.check_string_dtype(dtype).encoding == "ascii"


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_other_images_and_classes_come_back(suffix, tmp_path):
    run = loaded("convnet", (23, 40, 3), num_classes=7)
    export_keras.export_file(run, tmp_path / f"model{suffix}")
    content = keras_files.read(tmp_path / f"model{suffix}")
    found = import_keras.recognise(content, None)
    params = import_keras.params_of(content, *found[1:])
    assert found == ("convnet", run.model, (23, 40, 3))
    assert_equal(params, run.variables["params"])


def test_weights_of_keras_2_alone_are_read(tmp_path):
    # `save_weights("model.h5")` wrote what `save` does, without the configuration around it.
    run, path = loaded("baseline"), tmp_path / "model.h5"
    export_keras.export_file(run, tmp_path / "whole.h5")
    with h5py.File(tmp_path / "whole.h5") as whole, h5py.File(path, "w") as file:
        for name in whole["model_weights"]:
            whole.copy(f"model_weights/{name}", file)
        file.attrs.update(whole["model_weights"].attrs)
    content = keras_files.read(path)
    found = import_keras.recognise(content, None)
    params = import_keras.params_of(content, *found[1:])
    assert found[0] == "baseline"
    assert_equal(params, run.variables["params"])


def legacy_weights(path, layers):
    """What Keras 2 saves as weights alone: arrays of each layer by its name."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = list(layers)
        for name, arrays in layers.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{i}" for i in range(len(arrays))]
            for i, array in enumerate(arrays):
                group[f"{name}/{i}"] = array


@pytest.mark.usefixtures("read_here")
def test_weights_alone_of_a_model_within_a_model_are_read(tmp_path):
    # As in TensorFlow's `Sequential([model, Softmax()])`.
    params = loaded("baseline").variables["params"]
    inner = [params[name][key] for name in sorted(params) for key in ("kernel", "bias")]
    legacy_weights(tmp_path / "model.h5", {"sequential": inner, "softmax": []})
    content = keras_files.read(tmp_path / "model.h5")
    # It does not say what dropout there is.
    with pytest.raises(UserError, match="baseline.*but for its dropout: say which with --model"):
        import_keras.recognise(content, None)
    found = import_keras.recognise(content, "baseline")
    assert_equal(import_keras.params_of(content, *found[1:]), params)


@pytest.mark.parametrize("name", ["average_pooling2d_1", "rescaling", "tf.math.truediv", "permute"])
@pytest.mark.usefixtures("read_here")
def test_weights_alone_among_layers_that_compute_something_else_are_refused(name, tmp_path):
    params = loaded("baseline").variables["params"]
    layers = {each: [params[each]["kernel"], params[each]["bias"]] for each in sorted(params)}
    layers["dropout"] = layers["my_own_pool"] = []
    legacy_weights(tmp_path / "model.h5", layers)
    assert taken(tmp_path / "model.h5") == "baseline"
    legacy_weights(tmp_path / "model.h5", layers | {name: []})
    with pytest.raises(UserError, match=f"none of the seven networks has: {re.escape(name)}"):
        taken(tmp_path / "model.h5")


@pytest.mark.parametrize("separator", ["/", "\\"])
@pytest.mark.parametrize("place", ["layers", "_layer_checkpoint_dependencies"])
def test_keras_2_calls_the_layers_otherwise(place, separator, tmp_path):
    """2.12 and 2.13 count by twos; on Windows the separator is none to HDF5."""
    run, path = loaded("convnet"), tmp_path / "model.weights.h5"
    export_keras.export_file(run, path)
    step = 1 if place == "layers" else 2
    with h5py.File(path, "a") as file:
        file.move("layers", "before")
        for name in file["before"]:
            kind, number = re.fullmatch(r"(.+?)(?:_(\d+))?", name).groups()
            called = f"{kind}_{step * int(number)}" if number else kind
            file.copy(f"before/{name}", f"{place}{separator}{called}")
        del file["before"]
    content = keras_files.read(path)
    found = import_keras.recognise(content, None)
    assert found[0] == "convnet"
    assert_equal(import_keras.params_of(content, *found[1:]), run.variables["params"])


@pytest.mark.parametrize("suffix", keras_files.SUFFIXES)
@pytest.mark.parametrize("name", models.names())
def test_real_keras_loads_what_is_exported(keras, name, suffix, tmp_path):
    from tests import keras_networks

    run, path = loaded(name), tmp_path / f"model{suffix}"
    export_keras.export_file(run, path)
    if suffix == ".weights.h5":
        model = keras_networks.create(name)
        model.load_weights(path)
        assert_equal(keras_networks.params_of(model), run.variables["params"])
    else:
        model = keras.models.load_model(path)
        theirs = keras_networks.create(name)
        assert [type(layer) for layer in model.layers] == [type(layer) for layer in theirs.layers]
        rates = [[getattr(layer, "rate", None) for layer in m.layers] for m in (model, theirs)]
        assert rates[0] == rates[1]
        # In the order of the layers, and the export's names are Keras's own.
        theirs.set_weights(model.get_weights())
        assert_equal(keras_networks.params_of(theirs), run.variables["params"])
    images = uniform(3, (4, 28, 28, 1))
    logits = run.model.apply(run.variables, images)
    np.testing.assert_allclose(model(images), jax.nn.softmax(logits), atol=1e-6)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_what_is_exported_has_channels_last_and_float32_wherever_keras_is_set_otherwise(
    keras, suffix, tmp_path
):
    run, path = loaded("larger"), tmp_path / f"model{suffix}"
    export_keras.export_file(run, path)
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.models.load_model(path)
    finally:
        keras.config.set_image_data_format("channels_last")
        keras.config.set_dtype_policy("float32")
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    images = uniform(3, (4, 28, 28, 1))
    logits = run.model.apply(run.variables, images)
    np.testing.assert_allclose(model(images), jax.nn.softmax(logits), atol=1e-6)


@pytest.mark.parametrize("suffix", keras_files.SUFFIXES)
@pytest.mark.parametrize("name", models.names())
def test_what_real_keras_saves_is_recognised(keras, name, suffix, tmp_path):
    from tests import keras_networks

    model, path = keras_networks.create(name), tmp_path / f"model{suffix}"
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    # With the optimiser's own arrays, as after training.
    model.optimizer.build(model.trainable_variables)
    (model.save_weights if suffix == ".weights.h5" else model.save)(path)
    content = keras_files.read(path)
    found = import_keras.recognise(content, None)
    params = import_keras.params_of(content, *found[1:])
    assert found == (name, models.create(name), (28, 28, 1))
    assert_equal(params, keras_networks.params_of(model))


# Of the session, as `mnist` is, which is not to be prepared where Keras is absent.
@pytest.fixture(scope="session")
def keras():
    return pytest.importorskip("keras", minversion="3", reason="Keras 3 is not installed")


@pytest.fixture(scope="module")
def mnist_run(keras, mnist, prepared, tmp_path_factory):
    config = config_lib.recipe("larger", "mnist", model="larger", epochs=1, batch_size=100)
    config.data.train_split = "train[:6000]"
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(prepared))
        train.train_and_evaluate(config, folder)
    return folder


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_real_keras_scores_the_test_images_identically(keras, mnist_run, suffix, tmp_path):
    run, path = trained.load(mnist_run), tmp_path / f"model{suffix}"
    export_keras.export_file(run, path)
    model = keras.models.load_model(path)
    data = datasets.load("mnist", "test")
    probabilities = model.predict(data.images / np.float32(255), batch_size=500, verbose=0)
    np.testing.assert_array_equal(probabilities.argmax(1), run.predict(data.images).argmax(1))
    right = int((probabilities.argmax(1) == data.labels).sum())
    assert right == round(run.evaluate()["accuracy"] * 10_000) > 9000
    # And the way back, bit for bit.
    model.save(path)
    import_keras.import_file(path, tmp_path / "back")
    back = trained.load(tmp_path / "back")
    assert_equal(back.variables["params"], run.variables["params"])
    assert back.evaluate() == run.evaluate()


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("branched", ".keras"),
        ("convnet", ".h5"),
        ("double_conv_3x3", ".weights.h5"),
        ("double_conv_5x5", ".keras"),
        ("single_conv_5x5", ".h5"),
        ("baseline", ".weights.h5"),
        ("larger", ".weights.h5"),
    ],
)
def test_every_network_scores_the_test_images_as_in_real_keras(
    keras, mnist, prepared, name, suffix, tmp_path, monkeypatch
):
    from tests import keras_networks

    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    run, path = loaded(name), tmp_path / f"model{suffix}"
    export_keras.export_file(run, path)
    if suffix == ".weights.h5":
        model = keras_networks.create(name)
        model.load_weights(path)
    else:
        model = keras.models.load_model(path)
    data = datasets.load("mnist", "test")
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    images = data.images / np.float32(255)
    loss, accuracy = model.evaluate(images, data.labels, batch_size=500, verbose=0)
    run.config.data.name = "mnist"
    ours = run.evaluate("test")
    assert ours["count"] == 10_000
    assert round(ours["accuracy"] * 10_000) == round(accuracy * 10_000)
    assert ours["loss"] == pytest.approx(loss, rel=1e-5)


def test_neither_keras_nor_tensorflow_is_imported(tmp_path):
    code = (
        "import sys; from pathlib import Path; from mnist_flax import import_keras, trained, "
        f"export_keras; import_keras.import_file(Path({str(FOLDER / FILES[0])!r}), Path('run')); "
        "export_keras.export_file(trained.load('run'), Path('model.keras')); "
        "assert not {'keras', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_programs(tmp_path, capsys, monkeypatch):
    run_dir, out = str(tmp_path / "run"), str(tmp_path / "out.keras")
    monkeypatch.setattr("sys.argv", ["import_keras", str(FOLDER / FILES[0]), run_dir])
    import_keras.main()
    printed = capsys.readouterr().out
    assert f"larger_keras2.h5 holds larger; its weights are in the run folder {run_dir}" in printed
    assert f"mnist_flax.evaluate {run_dir}\n" in printed and "weights alone" not in printed
    monkeypatch.setattr("sys.argv", ["export_keras", run_dir, out])
    export_keras.main()
    printed = capsys.readouterr().out
    assert f"keras.models.load_model({out!r})" in printed
    with pytest.raises(UserError, match="out.keras exists: delete it or name another"):
        export_keras.main()


def test_a_run_folder_that_is_a_url_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["import_keras", str(FOLDER / FILES[0]), "gs://bucket/run"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(UserError, match="gs://bucket/run is a URL: name a folder of this machine"):
        import_keras.main()
    assert not list(tmp_path.iterdir())


def test_network_and_data_set_can_be_named(tmp_path, monkeypatch):
    def imported(*flags):
        run_dir = tmp_path / "-".join(["run", *flags])
        monkeypatch.setattr(
            "sys.argv", ["import_keras", str(FOLDER / FILES[0]), str(run_dir), *flags]
        )
        import_keras.main()
        return trained.load(run_dir).config

    assert imported().data.name == "mnist"
    assert imported("--dataset=kmnist").data.name == "kmnist"
    with pytest.raises(UserError, match="its network is not convnet but larger"):
        imported("--model=convnet")


def test_the_suffix_is_looked_at_before_a_run_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "load", None)
    monkeypatch.setattr("sys.argv", ["export_keras", str(tmp_path), str(tmp_path / "model.txt")])
    with pytest.raises(UserError, match="must end in .keras, .weights.h5, .h5"):
        export_keras.main()


def test_what_weights_alone_leave_open_is_said(tmp_path, capsys, monkeypatch):
    path = str(tmp_path / "model.weights.h5")
    export_keras.export_file(loaded("baseline"), Path(path))
    monkeypatch.setattr("sys.argv", ["import_keras", path, str(tmp_path / "run")])
    import_keras.main()
    assert (
        "weights alone: that activations, pools and the order of channels are those of baseline"
        in (capsys.readouterr().out)
    )


def test_an_imported_run_is_evaluated_and_predicts(tmp_path, capsys, monkeypatch):
    run, run_dir = loaded("baseline"), str(tmp_path / "run")
    export_keras.export_file(run, tmp_path / "model.keras")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    import_keras.import_file(Path("model.keras"), Path("run"), dataset="digits")
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["evaluate", run_dir])
    evaluate.main()
    data = datasets.load("digits", "test")
    images = data.images / np.float32(255)
    logits = run.model.apply(run.variables, images)
    right = int((np.asarray(logits).argmax(1) == data.labels).sum())
    assert f"({right:,} of {len(data.labels):,} right)" in capsys.readouterr().out
    Image.fromarray(data.images[3, :, :, 0]).save(tmp_path / "digit.png")
    monkeypatch.setattr("sys.argv", ["predict", run_dir, "digit.png"])
    predict.main()
    assert f"class {np.asarray(logits)[3].argmax()} (" in capsys.readouterr().out


def test_an_imported_network_trains_on_with_another_optimizer(tmp_path):
    # It drops nothing.
    name = "convnet"
    run, run_dir = loaded(name), tmp_path / "run"
    export_keras.export_file(run, tmp_path / "model.keras")
    import_keras.import_file(tmp_path / "model.keras", run_dir)
    config = config_lib.recipe(name, "digits", model=name, optimizer="rmsprop")
    config.data.train_split, config.epochs = "train[:32]", 1
    # As a start that was killed leaves it.
    rundir.write_config(run_dir, config)
    assert_equal(trained.load(run_dir).variables["params"], run.variables["params"])
    train.train_and_evaluate(config, run_dir)

    data = datasets.load("digits", "train[:32]")
    batch = steps.Batch(data.images / np.float32(255), data.labels, np.ones(32, np.float32))
    tx = parts.create_optimizer(config, 32)
    start = random_state(run.model, tx)
    after, _ = quick_jit(partial(steps.train_step, model=run.model, tx=tx))(start, batch)
    found = trained.load(run_dir)
    assert found.config.optimizer == "rmsprop" and found.step == 1
    for actual, expected in zip(
        jax.tree.leaves(found.variables["params"]), jax.tree.leaves(after.params), strict=True
    ):
        # A gradient near zero may have either sign.
        assert np.mean(np.abs(actual - expected) < 1e-5) > 0.99


def test_a_network_is_not_scored_on_images_of_another_shape(tmp_path):
    config, _ = import_keras.import_file(FOLDER / FILES[0], tmp_path / "run", dataset="digits")
    assert config.data.name == "digits"
    message = "digits has images of 28×28×1 pixels in 10 classes, and the network takes 12×12×1"
    with pytest.raises(UserError, match=message):
        trained.load(tmp_path / "run").evaluate()


def taken(path, name=None):
    content = keras_files.read(path)
    with keras_files.as_user_error(path):
        found, model, image_shape = import_keras.recognise(content, name)
        import_keras.params_of(content, model, image_shape)
    return found


def changed_config(tmp_path, change):
    path = tmp_path / "changed.h5"
    shutil.copy(FOLDER / FILES[1], path)
    with h5py.File(path, "a") as file:
        config = json.loads(file.attrs["model_config"])
        change(config["config"]["layers"])
        file.attrs["model_config"] = json.dumps(config)
    return path


def layer(config, name):
    return next(layer["config"] for layer in config if layer["config"]["name"] == name)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda c: layer(c, "dense").update(activation="tanh"), "Dense 128 tanh"),
        (lambda c: layer(c, "conv2d").update(strides=[2, 2]), "30 5×5 valid strides 2×2 relu"),
        (lambda c: layer(c, "conv2d").update(padding="same"), "30 5×5 same relu"),
        (lambda c: layer(c, "conv2d").update(dilation_rate=[2, 2]), "dilation_rate=[2, 2]"),
        (lambda c: layer(c, "conv2d").update(groups=2), "groups=2"),
        (lambda c: layer(c, "max_pooling2d").update(strides=[1, 1]), "2×2 strides 1×1"),
        (lambda c: layer(c, "max_pooling2d").update(padding="same"), "MaxPooling2D 2×2 same"),
        (lambda c: layer(c, "flatten").update(data_format="channels_first"), "channels_first"),
        (lambda c: layer(c, "dense_2").update(activation="sigmoid"), "Dense 10 sigmoid"),
        (lambda c: c.insert(1, {"class_name": "Lambda", "config": {"name": "x"}}), "Lambda"),
        (
            lambda c: c.insert(1, {"class_name": "Rescaling", "config": {"name": "x"}}),
            "has Rescaling",
        ),
        (
            lambda c: c.insert(2, {"class_name": "BatchNormalization", "config": {"name": "x"}}),
            "BatchNormalization",
        ),
        (lambda c: layer(c, "dense").update(use_bias=False), "Dense 128 use_bias=False relu"),
        (lambda c: c[5].update(class_name="\x1b[2JDropout"), "?[2JDropout"),
    ],
)
@pytest.mark.usefixtures("read_here")
def test_another_network_is_named(change, found, tmp_path):
    path = changed_config(tmp_path, change)
    with pytest.raises(UserError, match="none of larger, baseline") as error:
        taken(path)
    assert found in str(error.value)


@pytest.mark.usefixtures("read_here")
def test_a_network_can_be_named(tmp_path):
    path = changed_config(tmp_path, lambda c: layer(c, "dropout").update(rate=0.3))
    with pytest.raises(UserError, match="is larger, but for its dropout: say which with --model"):
        taken(path)
    assert taken(path, "larger") == "larger"
    same_for_all = changed_config(tmp_path, lambda c: layer(c, "dropout").update(noise_shape=[1]))
    with pytest.raises(UserError, match="is larger, but for its dropout"):
        taken(same_for_all)
    with pytest.raises(UserError, match="its network is not convnet but larger: it has Conv2D"):
        taken(path, "convnet")
    with pytest.raises(UserError, match="did you mean 'larger'"):
        import_keras.import_file(path, tmp_path / "run", "lager")


def changed_archive(tmp_path, change):
    """A `.keras` file with another configuration."""
    with zipfile.ZipFile(FOLDER / FILES[2]) as source:
        config = json.loads(source.read("config.json"))
    change(config["config"]["layers"])
    return archive(tmp_path / "changed.keras", **{"config.json": json.dumps(config)})


@pytest.mark.parametrize(
    ("change", "found"),
    [({"registered_name": "Mine>Dense"}, "Mine>Dense"), ({"module": "__main__"}, "__main__>Dense")],
)
@pytest.mark.usefixtures("read_here")
def test_a_class_of_ones_own_is_not_taken_for_keras_s(change, found, tmp_path):
    path = changed_archive(tmp_path, lambda layers: layers[-1].update(change))
    with pytest.raises(UserError, match=f"Dense 50 relu, {found}"):
        taken(path)


def activation_apart(kind, options):
    def change(layers):
        apart = {"class_name": kind, "config": {"name": "apart", **options}}
        dense = layer(layers, "dense")
        dense["activation"] = "linear"
        layers.insert(1 + [each["config"] for each in layers].index(dense), apart)

    return change


@pytest.mark.parametrize(
    ("kind", "options"), [("Activation", {"activation": "relu"}), ("ReLU", {"max_value": None})]
)
@pytest.mark.usefixtures("read_here")
def test_an_activation_may_be_a_layer_of_its_own(kind, options, tmp_path):
    assert taken(changed_config(tmp_path, activation_apart(kind, options))) == "larger"


@pytest.mark.parametrize(
    "layer_or_operation",
    [
        {"class_name": "ReLU", "config": {"name": "a", "max_value": None, "negative_slope": 0.0}},
        {"class_name": "Activation", "config": {"name": "a", "activation": "relu"}},
    ],
)
@pytest.mark.usefixtures("read_here")
def test_a_layer_may_be_the_activation_of_another(layer_or_operation, tmp_path):
    def change(layers):
        layer(layers, "dense")["activation"] = layer_or_operation

    assert taken(changed_config(tmp_path, change)) == "larger"
    layer_or_operation["config"] |= {"activation": "tanh", "max_value": 6.0}
    with pytest.raises(UserError, match="none of larger"):
        taken(changed_config(tmp_path, change))


def test_the_operation_relu_is_an_activation():
    config = json.loads((FOLDER / "branched_keras3.json").read_text())
    expected = keras_layers.describe(config).nodes
    layers = config["config"]["layers"]
    dense = next(each for each in layers if each["name"] == "dense_3")
    after = next(each for each in layers if each["name"] == "dense_4")
    dense["config"]["activation"] = "linear"
    (call,) = json.loads(json.dumps(after["inbound_nodes"]))
    after["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = "relu"
    operation = {"class_name": "Relu", "name": "relu", "config": {"name": "relu"}}
    layers.append(operation | {"module": "keras.src.ops.nn", "inbound_nodes": [call]})
    assert keras_layers.describe(config).nodes == expected


def test_a_network_may_name_its_output():
    config = json.loads((FOLDER / "branched_keras3.json").read_text())
    expected = keras_layers.describe(config)
    config["config"]["output_layers"] = {"digit": config["config"]["output_layers"]}
    assert keras_layers.describe(config) == expected
    config["config"]["output_layers"]["again"] = config["config"]["output_layers"]["digit"]
    with pytest.raises(UserError, match="has other than one output"):
        keras_layers.describe(config)


@pytest.mark.parametrize("name", ["softmax_v2", "softmax"])
@pytest.mark.usefixtures("read_here")
def test_tensorflows_softmax_is_one(name, tmp_path):
    function = {"class_name": "function", "config": name, "module": "builtins"}
    change = lambda c: layer(c, "dense_2").update(activation=function)  # noqa: E731
    path = changed_config(tmp_path, change)
    if name == "softmax_v2":
        assert taken(path) == "larger"
    else:
        # Keras writes its own by name alone: this one is somebody else's.
        with pytest.raises(UserError, match="none of larger"):
            taken(path)


@pytest.mark.usefixtures("read_here")
def test_a_linear_activation_at_the_end_is_none(tmp_path):
    def change(layers):
        config = {"name": "last", "activation": "linear", "dtype": "float32"}
        layers.append({"class_name": "Activation", "config": config})

    assert taken(changed_config(tmp_path, change)) == "larger"


def test_a_layer_may_be_called_with_inputs_by_name():
    config = json.loads((FOLDER / "branched_keras3.json").read_text())
    expected = keras_layers.describe(config)
    (call,) = config["config"]["layers"][2]["inbound_nodes"]
    call["kwargs"] = {"inputs": call["args"][0]}
    call["args"] = []
    assert keras_layers.describe(config) == expected


@pytest.mark.parametrize(
    ("kind", "options", "found"),
    [
        ("Activation", {"activation": "tanh"}, "Dense 128, Activation tanh"),
        ("ReLU", {"max_value": 6.0}, "Dense 128, ReLU max_value=6.0"),
        ("ReLU", {"negative_slope": 0.1}, "Dense 128, ReLU negative_slope=0.1"),
        ("ReLU", {"threshold": 1.0}, "Dense 128, ReLU threshold=1.0"),
        ("LeakyReLU", {}, "Dense 128, LeakyReLU"),
    ],
)
@pytest.mark.usefixtures("read_here")
def test_another_activation_of_its_own_is_named(kind, options, found, tmp_path):
    with pytest.raises(UserError, match=found):
        taken(changed_config(tmp_path, activation_apart(kind, options)))


def test_an_activation_before_all_is_named():
    first = {"name": "first", "activation": "relu", "batch_input_shape": [None, 28, 28, 1]}
    layers = [
        {"class_name": "Activation", "config": first},
        {"class_name": "Flatten", "config": {"name": "flat"}},
    ]
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": layers}}
    found = keras_layers.describe(config).nodes
    assert [node.text for node in found] == ["Activation relu", "Flatten"]


@pytest.mark.usefixtures("read_here")
def test_an_activation_after_another_is_not_left_out(tmp_path):
    def change(layers):
        layers.append({"class_name": "Softmax", "config": {"name": "again"}})

    with pytest.raises(UserError, match="Dense 10 softmax, Softmax"):
        taken(changed_config(tmp_path, change))


@pytest.mark.usefixtures("read_here")
def test_a_network_without_its_weights_is_said(tmp_path):
    path = tmp_path / "model.h5"
    shutil.copy(FOLDER / FILES[1], path)
    with h5py.File(path, "a") as file:
        file["model_weights"].attrs["layer_names"] = []
    with pytest.raises(UserError, match="its weights are not those of its layers"):
        taken(path)


def test_names_without_end_are_refused(tmp_path):
    with h5py.File(tmp_path / "long.h5", "w") as file:
        file.attrs["layer_names"] = ["x" * 2**20, "x"]
    with h5py.File(tmp_path / "many.weights.h5", "w") as file:
        for i in range(5):
            file.create_group(f"layers/{i}{'x' * (2**20 - 10)}/vars")
    with pytest.raises(UserError, match="the attribute layer_names takes 1,048,577 bytes"):
        keras_files.read(tmp_path / "long.h5")
    with pytest.raises(UserError, match=r"its names take 5,242,\d+ bytes"):
        keras_files.read(tmp_path / "many.weights.h5")


def test_a_layer_called_with_arguments_is_refused():
    config = json.loads((FOLDER / "branched_keras3.json").read_text())
    call = config["config"]["layers"][2]["inbound_nodes"][0]
    call["kwargs"] = {"training": None}
    keras_layers.describe(config)
    call["kwargs"] = {"training": True}
    with pytest.raises(UserError, match="calls a layer with further arguments"):
        keras_layers.describe(config)
    config = json.loads((FOLDER / "branched_keras2.json").read_text())
    calls = config["config"]["layers"][2]["inbound_nodes"]
    calls[0][0][3] = {"training": True}
    with pytest.raises(UserError, match="calls a layer with further arguments"):
        keras_layers.describe(config)
    # As Keras 2 writes 1 - x.
    calls[0] = ["_CONSTANT_VALUE", -1, 1.0, {"y": ["input_1", 0, 0], "name": None}]
    with pytest.raises(UserError, match="calls a layer with further arguments"):
        keras_layers.describe(config)


def test_a_layer_used_twice_or_a_second_output_is_said():
    config = json.loads((FOLDER / "branched_keras3.json").read_text())
    dense = config["config"]["layers"][-1]
    dense["inbound_nodes"] *= 2
    with pytest.raises(UserError, match="uses one layer several times"):
        keras_layers.describe(config)
    del dense["inbound_nodes"][1:]
    first, last = config["config"]["layers"][-2]["name"], dense["name"]
    config["config"]["output_layers"] = [[last, 0, 0], [first, 0, 0]]
    with pytest.raises(UserError, match="has other than one output"):
        keras_layers.describe(config)


def test_an_activation_that_others_take_too_is_not_put_into_its_layer():
    def tensor(name):
        return {"class_name": "__keras_tensor__", "config": {"keras_history": [name, 0, 0]}}

    def made(kind, name, *inputs, **options):
        calls = [{"args": [[*map(tensor, inputs)]], "kwargs": {}}] if inputs else []
        return {"class_name": kind, "config": {"name": name, **options}, "inbound_nodes": calls}

    layers = [
        made("InputLayer", "in", batch_shape=[None, 28, 28, 1]),
        made("Flatten", "flat", "in"),
        made("Dense", "dense", "flat", units=3, activation="linear"),
        made("ReLU", "relu", "dense"),
        made("Concatenate", "both", "relu", "dense"),
    ]
    inner = {"layers": layers, "output_layers": ["both", 0, 0]}
    nodes = keras_layers.describe({"class_name": "Functional", "config": inner}).nodes
    assert [node.text for node in nodes] == ["Flatten", "Dense 3", "ReLU", "Concatenate"]
    assert nodes[-1].inputs == (2, 1)


def test_operations_in_front_are_said():
    config = json.loads((FOLDER / "branched_keras3.json").read_text())
    first = config["config"]["layers"][1]
    tensors = first["inbound_nodes"][0]["args"]
    # As Keras 3 writes 1 - x.
    first["inbound_nodes"][0]["args"] = [1.0, *tensors]
    with pytest.raises(UserError, match="calls a layer with further arguments"):
        keras_layers.describe(config)
    first["inbound_nodes"][0]["args"] = tensors
    # The operation, which has its shape elsewhere than the layer.
    first |= {"class_name": "Reshape", "config": {"name": first["name"]}}
    first["registered_name"] = None
    assert keras_layers.describe(config).nodes[0].text == "Reshape"


@pytest.mark.parametrize(
    ("image", "target"), [((28, 28), [28, 28, -1]), ((784,), [-1, 28, 1]), ((784,), [28, 28, 1])]
)
def test_one_size_of_a_reshape_may_be_left_open(image, target):
    layers = [
        {"class_name": "InputLayer", "config": {"name": "in", "batch_shape": [None, *image]}},
        {"class_name": "Reshape", "config": {"name": "reshape", "target_shape": target}},
        {"class_name": "Flatten", "config": {"name": "flat"}},
    ]
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": layers}}
    assert keras_layers.describe(config).image_shape == (28, 28, 1)
    # What the sizes are of is not said.
    del layers[0]
    config["config"]["build_input_shape"] = None
    if -1 in target:
        with pytest.raises(UserError, match="its images are of the shape"):
            keras_layers.describe(config)


@pytest.mark.parametrize("size", [0, -1, 2.5, "28", 1025, 10**30])
@pytest.mark.usefixtures("read_here")
def test_images_of_no_size_are_refused(size, tmp_path):
    def change(layers):
        layers[0]["config"]["batch_shape"] = [None, 12, size, 1]

    with pytest.raises(UserError, match="its images are of the shape"):
        taken(changed_archive(tmp_path, change))


def test_weights_that_are_not_those_of_the_images_are_refused(tmp_path):
    def change(layers):
        layers[0]["config"]["batch_shape"] = [None, 1000, 1000, 1]

    with pytest.raises(UserError, match="the kernel of Dense_0 has the shape"):
        taken(changed_archive(tmp_path, change))


def test_logits_are_as_good_as_probabilities(tmp_path):
    change = lambda c: layer(c, "dense_2").update(activation="linear")  # noqa: E731
    assert taken(changed_config(tmp_path, change)) == "larger"


def test_weights_among_other_layers_are_refused(tmp_path):
    path = tmp_path / "model.weights.h5"
    export_keras.export_file(loaded("larger"), path)
    with h5py.File(path, "a") as file:
        file.create_group("layers/activation/vars")
    assert taken(path) == "larger"
    with h5py.File(path, "a") as file:
        for name in ("rescaling", "leaky_re_lu_1"):
            file.create_group(f"layers/{name}/vars")
    with pytest.raises(UserError, match="none of the seven networks has: leaky_re_lu_1, rescaling"):
        taken(path)


def test_weights_that_fit_two_networks_leave_it_open(tmp_path):
    path = tmp_path / "model.weights.h5"
    export_keras.export_file(loaded("baseline"), path)
    with h5py.File(path, "a") as file:
        # As a model without dropout saves them.
        del file["layers/dropout"]
    with pytest.raises(UserError, match="is baseline or single_conv_5x5, but for its dropout"):
        taken(path)
    assert taken(path, "baseline") == "baseline"


def test_weights_of_a_network_without_the_pool_are_refused(tmp_path):
    path = tmp_path / "model.weights.h5"
    export_keras.export_file(loaded("baseline"), path)
    # As of a convolution with strides of 2, whose arrays are of the same shapes.
    with h5py.File(path, "a") as file:
        del file["layers/max_pooling2d"]
    with pytest.raises(UserError, match="it has 0 MaxPooling2D and arrays of 5×5×1×32"):
        taken(path)
    # Where no layers without weights are listed, nothing is said of pools.
    with h5py.File(path, "a") as file:
        for name in ("dropout", "flatten", "input_layer"):
            del file[f"layers/{name}"]
    assert taken(path, "baseline") == "baseline"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file"),
        (b"", "neither an HDF5 nor a .keras file"),
        (b"no model", "neither an HDF5 nor a .keras file"),
        (b"PK\x03\x04 no zip", "is damaged"),
        (b"\x89HDF\r\n\x1a\n no more", "is damaged"),
    ],
)
def test_what_is_no_file_of_keras_is_refused(content, message, tmp_path):
    path = tmp_path / "model.h5"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_keras.import_file(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match="is in use: name a new or an empty folder"):
        import_keras.import_file(FOLDER / FILES[0], tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["diary.txt"]


@pytest.mark.parametrize("name", ["", ".", "../here"])
def test_the_current_folder_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the current folder: name a new or an empty"):
        import_keras.import_file(FOLDER / FILES[0], Path(name))
    assert not list((tmp_path / "here").iterdir())


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.h5")
    with pytest.raises(UserError, match="is no file"):
        import_keras.import_file(tmp_path / "model.h5", tmp_path / "run")


@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_short_is_damaged(file, tmp_path):
    whole, path = (FOLDER / file).read_bytes(), tmp_path / file
    for length in (8, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged"):
            import_keras.import_file(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", FILES)
def test_damage_is_said(file, tmp_path):
    """Of a file with a few bytes changed, nothing else is raised."""
    whole, path = (FOLDER / file).read_bytes(), tmp_path / file
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(6):
        damaged = bytearray(whole)
        # The structure lies at the beginning and between the arrays.
        for place in rng.integers(0, 4000, 30):
            damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            taken(path)
        except UserError:
            refused += 1
    assert refused >= 3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.abort()", "the HDF5 library crashed on it"),
        ("while True: pass", "cannot be taken: reading it did not end in 1 s"),
        ("raise SystemExit('broken')", "(broken)"),
        ("raise SystemExit(4)", "cannot be taken: it takes more memory than is free"),
        ("import os; os.kill(os.getpid(), 9)", "it takes more memory than is free"),
        ("import sys; print('huge', file=sys.stderr); sys.exit(3)", "cannot be taken: huge"),
    ],
)
def test_a_reader_that_fails_is_said(code, message, tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text(code)
    monkeypatch.setattr(keras_files.hdf5_reader, "__file__", str(tmp_path / "failing.py"))
    monkeypatch.setattr(keras_files, "_MAX_SECONDS", 1 if "while" in code else 60)
    with pytest.raises(UserError) as error:
        keras_files.read(FOLDER / FILES[0])
    assert message in str(error.value)


def kernel_replaced(tmp_path, make):
    path = tmp_path / "hostile.h5"
    shutil.copy(FOLDER / FILES[0], path)
    with h5py.File(path, "a") as file:
        parent = file["model_weights/conv2d/conv2d"]
        kernel = parent["kernel:0"][()]
        del parent["kernel:0"]
        make(parent, kernel)
    return path


def virtual(parent, kernel):
    layout = h5py.VirtualLayout(kernel.shape, "f4")
    layout[...] = h5py.VirtualSource("/etc/passwd", "x", kernel.shape)
    parent.create_virtual_dataset("kernel:0", layout)


def theano(parent, kernel):
    parent["kernel:0"] = kernel
    parent.file.attrs["backend"] = "theano"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, k: p.__setitem__("kernel:0", h5py.ExternalLink("/etc/x.h5", "/x")), "missing"),
        (lambda p, k: p.__setitem__("kernel:0", h5py.SoftLink("/model_weights")), "missing"),
        (lambda p, k: None, "missing"),
        (lambda p, k: p.create_group("kernel:0"), "is no dataset"),
        (
            lambda p, k: p.create_dataset(
                "kernel:0", k.shape, "f4", external=[("/etc/passwd", 0, 9999)]
            ),
            "not stored as Keras",
        ),
        (virtual, "not stored as Keras"),
        (lambda p, k: p.create_dataset("kernel:0", data=k, compression="gzip"), "not stored as"),
        (lambda p, k: p.create_dataset("kernel:0", k.shape, "f4"), "not stored as Keras"),
        (lambda p, k: p.create_dataset("kernel:0", (2**40,), "f4", chunks=(8,)), "not stored as"),
        # As a quantised model has it.
        (lambda p, k: p.create_dataset("kernel:0", data=k.astype("i1")), "is int8: have"),
        (lambda p, k: p.create_dataset("kernel:0", data=k.astype("f8")), "is float64: have"),
        (lambda p, k: p.create_dataset("kernel:0", data=k[0, 0, 0]), "has the shape"),
        (lambda p, k: p.create_dataset("kernel:0", (0, 0, 0, 0), "f4"), "has the shape"),
        (lambda p, k: p.create_dataset("kernel:0", data=k + np.nan), "numbers that are NaN"),
        (lambda p, k: p.create_dataset("kernel:0", data=k.astype("f2").view("V2")), "is bfloat16"),
        (theano, "Theano mirrors kernels"),
    ],
)
@pytest.mark.usefixtures("read_here")
def test_a_hostile_array_is_not_read(make, message, tmp_path):
    with pytest.raises(UserError, match=message):
        taken(kernel_replaced(tmp_path, make))


@pytest.mark.usefixtures("read_here")
def test_numbers_may_be_stored_the_other_way_round(tmp_path):
    swapped = lambda p, k: p.create_dataset("kernel:0", data=k.astype(">f4"))  # noqa: E731
    content = keras_files.read(kernel_replaced(tmp_path, swapped))
    kernel = content.weights[0][0].values
    assert kernel.dtype == np.dtype("float32") and kernel.dtype.isnative
    np.testing.assert_array_equal(kernel, fixture_params()["Conv_0"]["kernel"])


@pytest.mark.usefixtures("read_here")
def test_the_state_of_a_random_generator_is_no_weight(tmp_path):
    path = tmp_path / "model.h5"
    shutil.copy(FOLDER / FILES[0], path)
    with h5py.File(path, "a") as file:
        layer = file["model_weights/dropout"]
        layer["seed_generator_state"] = np.array([7, 1], np.int64)
        layer.attrs["weight_names"] = ["seed_generator_state"]
    assert taken(path) == "larger"


@pytest.mark.usefixtures("read_here")
def test_arrays_without_end_are_refused(tmp_path):
    with h5py.File(tmp_path / "many.h5", "w") as file:
        file.create_dataset("layer/array", (3,), "f8")
        file["layer"].attrs["weight_names"] = ["array"] * 600
        file.attrs["layer_names"] = ["layer"] * 2
    with pytest.raises(UserError, match="its layers name more than 1,000 arrays"):
        keras_files.read(tmp_path / "many.h5")


@pytest.mark.usefixtures("read_here")
def test_one_array_in_many_places_is_not_read_so_often(tmp_path):
    path = tmp_path / "hostile.weights.h5"
    with h5py.File(path, "w") as file:
        file["layers/dense/vars/0"] = np.zeros((1000, 1000), np.float32)
        for i in range(1, 100):
            file[f"layers/dense_{i}/vars/0"] = file["layers/dense/vars/0"]
    assert path.stat().st_size < 5e6
    with pytest.raises(UserError, match=r"its arrays take more than 4,\d{3},\d{3} bytes"):
        keras_files.read(path)


def archive(path, **members):
    with zipfile.ZipFile(FOLDER / FILES[2]) as source:
        contents = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in (contents | members).items():
            if content is not None:
                target.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"config.json": None}, "no item named 'config.json'"),
        ({"model.weights.h5": None}, "no item named 'model.weights.h5'"),
        ({"model.weights.h5": b"no HDF5"}, "is damaged"),
        ({"model.weights.h5": bytes(2**25)}, "unpacks to 33,554,432 bytes"),
        ({"config.json": "{"}, "is damaged"),
        ({"config.json": "[" * 100_000}, "is damaged"),
        ({"config.json": '{"class_name": "Lambda", "config": {}}'}, "holds a Lambda"),
        ({"config.json": b" " * (2**20 + 1)}, "unpacks to 1,048,577 bytes"),
        ({"config.json": b'{"class_name": "Sequential", "config": []}'}, "network of 0 layers"),
    ],
)
@pytest.mark.usefixtures("read_here")
def test_a_hostile_archive_is_refused(members, message, tmp_path):
    path = archive(tmp_path / "hostile.keras", **members)
    assert path.stat().st_size < 2**20
    with pytest.raises(UserError, match=message):
        taken(path)


@pytest.mark.parametrize("file", FILES)
def test_what_is_too_large_is_not_called_damaged(file):
    code = "from mnist_flax import hdf5_reader as r; r._MAX_BYTES = 10_000; r.main()"
    command = [sys.executable, "-c", code, str(FOLDER / file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == hdf5_reader.TOO_LARGE
    assert "10,000" in done.stderr


def test_an_archive_that_understates_its_sizes_is_not_unpacked(tmp_path):
    path = archive(tmp_path / "hostile.keras", **{"config.json": b"{}" + b" " * 2**28})
    content, stated = bytearray(path.read_bytes()), struct.pack("<I", 2**28 + 2)
    # In front of the member and in the directory at the end.
    assert content.count(stated) == 2
    path.write_bytes(content.replace(stated, struct.pack("<I", 2)))
    tracemalloc.start()
    with pytest.raises(Exception, match="Bad CRC-32"):
        hdf5_reader.read(str(path))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.usefixtures("read_here")
def test_an_archive_compressed_otherwise_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "hostile.keras", "w", zipfile.ZIP_LZMA) as target:
        target.writestr("config.json", "{}")
    with pytest.raises(UserError, match="is compressed as Keras does not"):
        taken(tmp_path / "hostile.keras")


def test_a_network_that_goes_in_circles_is_refused(tmp_path):
    config = json.loads((FOLDER / "branched_keras3.json").read_text())
    first = config["config"]["layers"][1]
    first["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = first["name"]
    path = archive(tmp_path / "hostile.keras", **{"config.json": json.dumps(config)})
    with pytest.raises(UserError, match="is damaged"):
        taken(path)


@pytest.mark.parametrize("name", ["model.txt", "model", "missing/model.keras"])
def test_a_file_that_cannot_be_written_is_said(name, tmp_path):
    with pytest.raises(UserError, match="must end in|cannot be written"):
        export_keras.export_file(loaded("larger"), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", full_disk)
    for suffix in keras_files.SUFFIXES:
        with pytest.raises(UserError, match="cannot be written .No space left on device"):
            export_keras.export_file(loaded("larger"), tmp_path / f"model{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_import_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(import_keras.checkpoint, "save", full_disk)
    with pytest.raises(UserError, match="run cannot be written .*No space left"):
        import_keras.import_file(FOLDER / FILES[0], tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_import_may_be_open_to_others(tmp_path):
    import_keras.import_file(FOLDER / FILES[0], tmp_path / "run")
    (tmp_path / "made").mkdir()
    assert (tmp_path / "run").stat().st_mode == (tmp_path / "made").stat().st_mode


def test_an_imported_run_trains_on(tmp_path):
    run = loaded("baseline")
    export_keras.export_file(run, tmp_path / "model.keras")
    import_keras.import_file(tmp_path / "model.keras", tmp_path / "run", dataset="digits")
    config = trained.load(tmp_path / "run").config
    # One step of gradients times nothing: the weights are those of the file.
    config.update(epochs=1, learning_rate=1e-30)
    config.data.train_split = "train[:32]"
    summary = train.train_and_evaluate(config, tmp_path / "run")
    after = trained.load(tmp_path / "run")
    assert after.step == 1 and summary["train_examples"] == 32
    assert_equal(after.variables["params"], run.variables["params"])


def test_an_imported_run_draws_dropout_by_its_seed(tmp_path, monkeypatch):
    in_order = np.arange(32, dtype=np.int32)[None]
    monkeypatch.setattr(train.batches, "train_batches", lambda *args: in_order)
    name = "single_conv_5x5"
    run = loaded(name)
    export_keras.export_file(run, tmp_path / "model.keras")
    trained_params = []
    for seed in (1, 2):
        import_keras.import_file(tmp_path / "model.keras", tmp_path / f"run{seed}")
        config = config_lib.recipe(name, "digits", model=name, seed=seed)
        config.update(batch_size=32, epochs=1, parallel=1)
        config.data.train_split = "train[:32]"
        train.train_and_evaluate(config, tmp_path / f"run{seed}")
        trained_params.append(trained.load(tmp_path / f"run{seed}").variables["params"])
    first, second = (params["Conv_0"]["kernel"] for params in trained_params)
    assert np.mean(np.abs(first - second) > 1e-4) > 0.1


def test_a_refused_start_leaves_an_imported_run_as_it_was(tmp_path):
    run_dir = tmp_path / "run"
    import_keras.import_file(FOLDER / FILES[0], run_dir, dataset="fashion_mnist")
    before = (run_dir / "config.json").read_bytes()
    model = trained.load(run_dir).config.model
    config = config_lib.recipe(model, "digits", model=model)
    with pytest.raises(UserError, match="digits is not the data set that this run was trained on"):
        train.train_and_evaluate(config, run_dir)
    assert (run_dir / "config.json").read_bytes() == before


def test_a_link_to_an_empty_folder_will_do(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    import_keras.import_file(FOLDER / FILES[0], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert trained.load(tmp_path / "real").step == 0


def test_too_little_memory_for_a_file_is_said(tmp_path):
    message = r"model.h5 cannot be taken: it takes more memory than is free$"
    with pytest.raises(UserError, match=message), keras_files.as_user_error(tmp_path / "model.h5"):
        raise MemoryError


def test_paths_that_cannot_be_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.keras", tmp_path / ("x" * 300 + ".keras")):
        with pytest.raises(UserError, match="cannot be written"):
            export_keras.export_file(loaded("larger"), path)
        with pytest.raises(UserError, match="cannot be (used|written)"):
            import_keras.import_file(FOLDER / FILES[0], path)


def test_a_long_reason_is_cut(tmp_path):
    with (
        pytest.raises(UserError) as error,
        keras_files.as_user_error(tmp_path / "model.h5"),
    ):
        raise UserError("x" * 10_000)
    assert len(str(error.value)) < 1000


@pytest.mark.usefixtures("read_here")
def test_half_precision_is_read_and_widened(tmp_path):
    half = lambda p, k: p.create_dataset("kernel:0", data=k.astype("f2"))  # noqa: E731
    kernel = keras_files.read(kernel_replaced(tmp_path, half)).weights[0][0].values
    assert kernel.dtype == np.float32
    expected = fixture_params()["Conv_0"]["kernel"]
    np.testing.assert_array_equal(kernel, expected.astype(np.float16).astype(np.float32))


def test_a_network_of_very_many_layers_is_refused():
    layers = [{"class_name": "Flatten", "config": {"name": f"flat{i}"}} for i in range(101)]
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": layers}}
    with pytest.raises(UserError, match="a network of 101 layers, none of the seven"):
        keras_layers.describe(config)


def test_names_without_number_are_refused(tmp_path):
    with h5py.File(tmp_path / "many.h5", "w") as file:
        file.attrs["layer_names"] = ["x"] * 1001
    with pytest.raises(UserError, match="the attribute layer_names has 1,001 entries"):
        keras_files.read(tmp_path / "many.h5")
