import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mnist_flax import config as config_lib
from mnist_flax import datasets, evaluate, export_keras, predict, rundir, scoring, train, trained
from mnist_flax.errors import UserError


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, prepared):
    config = config_lib.recipe("small", "mnist", model="baseline", data__name="digits", epochs=2)
    config.batch_size, config.data.train_split = 25, "train[:500]"
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(prepared))
        train.train_and_evaluate(config, folder)
    return folder


@pytest.fixture(scope="module")
def run(run_dir):
    return trained.load(run_dir)


@pytest.fixture
def images():
    return datasets.load("digits", "test[:7]").images


def test_probabilities_are_those_of_the_network(run, images):
    probabilities = run.predict(images)
    assert probabilities.shape == (7, 10) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    logits = np.asarray(run.model.apply(run.variables, images / np.float32(255)), np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_images_may_be_bytes_or_floats_with_or_without_channels(run, images):
    expected = run.predict(images)
    np.testing.assert_array_equal(run.predict(images[..., 0]), expected)
    np.testing.assert_allclose(run.predict(images / 255), expected, atol=1e-6)
    # As resizing may round.
    np.testing.assert_allclose(run.predict(images * (1 + 1e-7) / 255), expected, atol=1e-6)
    rounded = (images / 255).astype(jnp.bfloat16)
    expected = run.predict(rounded.astype(np.float32))
    np.testing.assert_allclose(run.predict(rounded), expected, atol=1e-6)


def test_any_number_of_images_can_be_predicted(run, images, monkeypatch):
    expected = run.predict(images)
    predict, sizes = run._predict_batch, []
    monkeypatch.setattr(scoring, "batch_size", lambda image_shape: 3)
    monkeypatch.setattr(run, "_predict_batch", lambda x: sizes.append(len(x)) or predict(x))
    np.testing.assert_allclose(run.predict(images), expected, atol=1e-6)
    assert max(sizes) == 3 and sum(sizes) == len(images)
    assert run.predict(images[:0]).shape == (0, 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((28, 28)), r"shape \(28, 28\) do not fit this network: give \[B, 28, 28, 1\]"),
        (np.zeros((2, 32, 32, 3)), "do not fit this network"),
        (np.full((1, 28, 28, 1), 255.0), r"reach from 255 to 255: scale them to \[0, 1\]"),
        (np.full((1, 28, 28, 1), np.nan), "reach from nan to nan"),
        (np.full((1, 28, 28, 1), -1.0), r"reach from -1 to -1: scale them to \[0, 1\]"),
        (np.zeros((1, 28, 28, 1), np.int64), "images are int64: give uint8"),
    ],
)
def test_images_that_do_not_fit_are_refused(run, wrong, message):
    with pytest.raises(UserError, match=message):
        run.predict(wrong)


def test_evaluate_counts_every_example_of_a_split(run):
    assert run.evaluate()["count"] == 297
    score = run.evaluate("train[1000:1107]")
    arrays = datasets.load("digits", "train[1000:1107]")
    right = run.predict(arrays.images).argmax(1) == arrays.labels
    assert score["count"] == 107
    assert score["accuracy"] == right.mean()
    with pytest.raises(UserError, match="'tset'"):
        run.evaluate("tset")


def test_a_split_in_several_pieces_is_scored_as_a_whole(run, monkeypatch):
    monkeypatch.setattr(scoring, "_PIECE_EXAMPLES", 1000)
    arrays = datasets.load("digits", "train[:1207]")
    probabilities, score = run.predict(arrays.images), run.evaluate("train[:1207]")
    assert score["count"] == 1207
    assert score["accuracy"] == (probabilities.argmax(1) == arrays.labels).mean()
    loss = -np.log(probabilities[np.arange(1207), arrays.labels]).mean()
    assert score["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_checkpoint_is_chosen_by_its_step(run_dir, run):
    assert run.step == 40
    assert trained.load(run_dir, step=20).step == 20
    with pytest.raises(UserError, match=r"no checkpoint of step 21: it has \[40, 20\]"):
        trained.load(run_dir, step=21)


def test_evaluate_prints_the_score(run_dir, run, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate", str(run_dir)])
    evaluate.main()
    out = capsys.readouterr().out
    assert "baseline after step 40, on test of digits\n" in out
    right = round(run.evaluate()["accuracy"] * 297)
    assert f"Test accuracy: {right / 297:.2%} ({right} of 297 right)" in out
    monkeypatch.setattr("sys.argv", ["evaluate", str(run_dir), "--split=train[:50]", "--step=20"])
    evaluate.main()
    out = capsys.readouterr().out
    assert "baseline after step 20, on train[:50] of digits\n" in out
    right = round(trained.load(run_dir, step=20).evaluate("train[:50]")["accuracy"] * 50)
    assert f"{right / 50:.2%} ({right} of 50 right)" in out


def test_predict_and_export_take_the_checkpoint_that_is_asked_for(
    run_dir, images, tmp_path, capsys, monkeypatch
):
    Image.fromarray(images[0, ..., 0]).save(tmp_path / "digit.png")
    for step in (20, 40):
        expected = trained.load(run_dir, step=step).predict(images[:1])[0]
        asked = ["predict", str(run_dir), str(tmp_path / "digit.png"), f"--step={step}"]
        monkeypatch.setattr("sys.argv", asked)
        predict.main()
        assert f"class {expected.argmax()} ({expected.max():.1%})" in capsys.readouterr().out
        path = tmp_path / f"{step}.weights.h5"
        monkeypatch.setattr("sys.argv", ["export", str(run_dir), str(path), f"--step={step}"])
        export_keras.main()
        assert f"holds baseline after step {step}; in Python" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*asked, "--seed=1"])
    with pytest.raises(UserError, match="has no seed 1"):
        predict.main()


def test_evaluate_looks_into_the_folder_of_the_official_files(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    run = trained.load(run_dir)
    run.config.data.name, run.config.data.manual_dir = "mnist", str(tmp_path / "absent")
    with pytest.raises(UserError, match="absent does not exist"):
        run.evaluate("test")


def test_a_data_set_of_more_classes_is_not_scored(run_dir, monkeypatch):
    monkeypatch.setattr(datasets, "num_classes", lambda name: 26)
    with pytest.raises(UserError, match="28×28×1 pixels in 26 classes.*takes 28×28×1 in 10"):
        trained.load(run_dir).evaluate()


def test_predict_reads_image_files(run_dir, run, images, tmp_path, capsys, monkeypatch):
    Image.fromarray(images[0, ..., 0]).save(tmp_path / "white on black.png")
    inverted = Image.fromarray(255 - images[0, ..., 0])
    inverted.resize((280, 280), Image.Resampling.NEAREST).save(tmp_path / "black on white.png")
    expected = run.predict(images[:1])[0]
    for name, flags in (("white on black.png", []), ("black on white.png", ["--invert"])):
        path = str(tmp_path / name)
        monkeypatch.setattr("sys.argv", ["predict", str(run_dir), path, *flags])
        predict.main()
        assert f"{path}: class {expected.argmax()} (" in capsys.readouterr().out
    np.testing.assert_array_equal(
        predict.read(tmp_path / "white on black.png", (28, 28, 1), invert=False), images[0]
    )


def test_an_image_file_is_made_to_fit_networks_of_other_images(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30, 0], pixels[20:, :, 2] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    found = predict.read(tmp_path / "image.png", (20, 30, 3), invert=False)
    np.testing.assert_array_equal(found[2:8, 2:12], [[[255, 0, 0]] * 10] * 6)
    np.testing.assert_array_equal(found[12:, 18:], [[[0, 0, 255]] * 12] * 8)


def test_predict_reads_what_a_viewer_shows(tmp_path):
    def read(image, invert=False, **options):
        image.save(tmp_path / "image.png", **options)
        return predict.read(tmp_path / "image.png", (28, 28, 1), invert)

    ramp = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    # 16 bits a pixel.
    wide = Image.fromarray(ramp.astype(np.uint16) * 256 + 255)
    np.testing.assert_array_equal(read(wide)[..., 0], ramp)
    # Ink on nothing: on white paper, or on black as the training images.
    for ink, invert in ((0, True), (255, False)):
        drawn = Image.fromarray(np.dstack([np.full((28, 28), ink, np.uint8), ramp]), "LA")
        np.testing.assert_array_equal(read(drawn, invert)[..., 0], ramp)
    # A photograph that is to be turned by a quarter to the right.
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(
        read(Image.fromarray(ramp), exif=exif)[..., 0], np.rot90(ramp, -1)
    )
    # 16 bits that Pillow gives as 32.
    (tmp_path / "image.pgm").write_bytes(b"P5 28 28 65535\n" + wide.tobytes()[1:] + b"\0")
    high = predict.read(tmp_path / "image.pgm", (28, 28, 1), invert=False)
    np.testing.assert_array_equal(high[:27, :, 0], ramp[:27])
    for other in (Image.fromarray(ramp.astype(np.float32)), Image.new("LAB", (28, 28))):
        other.save(tmp_path / "image.tiff")
        with pytest.raises(UserError, match=r"as an image \(.*(32 bits|LAB).*\): give"):
            predict.read(tmp_path / "image.tiff", (28, 28, 1), invert=False)


def broken_png():
    """Its second piece of pixels has a name that is none."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (512, 512), np.uint8)
    Image.fromarray(noise).save(file, "png")
    start, *pieces = file.getvalue().split(b"IDAT")
    return b"IDAT".join([start, pieces[0]]) + b"\0\0\0\0" + b"IDAT".join(pieces[1:])


@pytest.mark.parametrize(
    "content",
    [None, b"no image", broken_png()],
    ids=["missing", "text", "damaged"],
)
def test_predict_refuses_what_is_no_image(tmp_path, content):
    path = tmp_path / "image.png"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match="image.png cannot be read as an image"):
        predict.read(path, (28, 28, 1), invert=False)


def test_predict_leaves_no_image_to_another_program(tmp_path):
    Image.new("L", (28, 28)).save(tmp_path / "image.eps")
    with pytest.raises(UserError, match="cannot identify image file"):
        predict.read(tmp_path / "image.eps", (28, 28, 1), invert=False)


def test_predict_takes_one_picture_alone(tmp_path):
    first, second = (Image.new("L", (28, 28), grey) for grey in (0, 200))
    for name in ("image.gif", "image.png", "image.tiff"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        with pytest.raises(UserError, match=f"{name} cannot be read .*it has 2 pictures"):
            predict.read(tmp_path / name, (28, 28, 1), invert=False)


def test_predict_takes_a_cameras_jpeg_with_a_small_copy(tmp_path):
    picture, copy = Image.new("L", (280, 280), 200), Image.new("L", (28, 28))
    picture.save(tmp_path / "image.jpg", "MPO", save_all=True, append_images=[copy])
    assert Image.open(tmp_path / "image.jpg").n_frames == 2
    assert (predict.read(tmp_path / "image.jpg", (28, 28, 1), invert=False) == 200).all()


@pytest.mark.parametrize("invert", [False, True])
def test_one_of_16_bits_may_stand_for_nothing(invert, tmp_path):
    wide = np.full((28, 28), 256 * 100, np.uint16)
    wide[:9] = 77
    Image.fromarray(wide).save(tmp_path / "image.png", transparency=77)
    found = predict.read(tmp_path / "image.png", (28, 28, 1), invert)[..., 0]
    # Black as the images that were trained on, be it that of white paper inverted.
    assert (found[:9] == 0).all() and (found[9:] == (155 if invert else 100)).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.name", "mnist"), ("model", "convnet"), ("compute_dtype", "float99"), ("seed", 5)],
)
def test_a_configuration_that_is_not_that_of_the_checkpoints_is_said(run_dir, tmp_path, key, value):
    shutil.copytree(run_dir, tmp_path / "run")
    config = rundir.read_config(tmp_path / "run")
    config.update_from_flattened_dict({key: value})
    rundir.write_config(tmp_path / "run", config)
    with pytest.raises(UserError, match=f"another configuration than its config.json .{key} is"):
        trained.load(tmp_path / "run")


def test_without_a_device_a_run_is_not_loaded(run_dir, monkeypatch):
    def none(*args):
        raise RuntimeError("Unknown backend cuda")

    monkeypatch.setattr(jax, "devices", none)
    with pytest.raises(UserError, match=r"no device to compute on \(Unknown backend cuda\)"):
        trained.load(run_dir)


def test_a_folder_that_is_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        trained.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        trained.load(tmp_path / "nowhere")
