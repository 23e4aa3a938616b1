import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urljoin

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits
from tensorflow_datasets.core.download.checksums import UrlInfo

from mnist_flax import (
    builders,
    datasets,
    decoding,
    loaders,
    parallel,
    parts,
    preparation,
    train,
    trained,
)
from mnist_flax import config as config_lib
from mnist_flax.errors import UserError

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def fresh(monkeypatch, tmp_path) -> Path:
    """An empty data folder of the test's own."""
    folder = tmp_path / "tfds"
    folder.mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return folder


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def write_tfrecord_set(
    root: Path, name: str, version: str, shards: list[list[tuple[np.ndarray, int]]], extra=None
) -> Path:
    """Writes what `tfds.load` leaves: a `train` split of TFRecord shards, framed by hand."""
    folder = root / name / version
    folder.mkdir(parents=True, exist_ok=True)
    features = tfds.builder(name, data_dir=root / "nowhere").info.features
    for index, shard in enumerate(shards):
        path = folder / f"{name}-train.tfrecord-{index:05}-of-{len(shards):05}"
        with path.open("wb") as file:
            for image, label in shard:
                if isinstance(image, np.ndarray):
                    image = Image.fromarray(image)
                example = {"image": image, "label": label, **(extra or {})}
                record = features.serialize_example(example)
                file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
    info = {
        "fileFormat": "tfrecord",
        "name": name,
        "version": version,
        "splits": [
            {
                "name": "train",
                "shardLengths": [str(len(shard)) for shard in shards],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def grey(value: int) -> np.ndarray:
    return np.full((28, 28), value, np.uint8)


# Five images, told apart by their grey values, in shards of three and two.
FIVE = [[(grey(10), 1), (grey(20), 2), (grey(30), 3)], [(grey(40), 4), (grey(50), 5)]]


def test_digits_are_those_of_scikit_learn_in_the_order_of_its_file():
    expected = load_digits()
    train, test = datasets.load("digits", "train"), datasets.load("digits", "test")
    assert train.images.shape == (1500, 28, 28, 1) and train.images.dtype == np.uint8
    assert test.images.shape == (297, 28, 28, 1) and test.labels.dtype == np.int32
    np.testing.assert_array_equal(train.labels, expected.target[:1500])
    np.testing.assert_array_equal(test.labels, expected.target[1500:])
    images = np.concatenate([train.images, test.images])[..., 0]
    assert images.max() == 255
    frame = np.ones((28, 28), bool)
    frame[4:24, 4:24] = False
    assert not images[:, frame].any()
    # Averages over quarters of a digit survive the enlarging, up to the resampling's ringing.
    small = expected.images.reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4)) * 255 / 16
    large = images[:, 4:24, 4:24].reshape(-1, 2, 10, 2, 10).mean(axis=(2, 4))
    assert np.abs(small - large).max() < 20
    assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("split", "indices"),
    [
        ("train[1200:]", range(1200, 1500)),
        ("train[90%:]", range(1350, 1500)),
        ("train[-100:]", range(1400, 1500)),
        ("train[:10%]+train[80%:]", [*range(150), *range(1200, 1500)]),
        ("test+train[:2]", [*range(1500, 1797), 0, 1]),
    ],
)
def test_a_slice_selects_what_tfds_says(split, indices):
    every = datasets.load("digits", "all")
    found = datasets.load("digits", split)
    np.testing.assert_array_equal(found.labels, load_digits().target[list(indices)])
    np.testing.assert_array_equal(found.images, every.images[list(indices)])


def test_classes_of_sets_that_are_not_prepared(fresh):
    for name, classes in (("digits", 10), ("kmnist", 10), ("emnist/balanced", 47)):
        assert datasets.num_classes(name) == classes
    assert list(fresh.iterdir()) == []


@pytest.mark.parametrize(
    ("split", "other", "common"),
    [
        ("test", "test", True),
        ("test[:50%]", "test", True),
        ("train+test[290:]", "test[:291]", True),
        ("test[:100]", "test[100:]", False),
        ("train[90%:]", "test", False),
    ],
)
def test_overlap(split, other, common):
    datasets.load("digits", "test")
    assert datasets.overlap("digits", split, other) is common
    assert datasets.overlap("digits", other, split) is common


@pytest.mark.parametrize(
    ("name", "split", "said"),
    [
        ("mnits", "train", "did you mean 'mnist'?"),
        ("MNIST", "train", "did you mean 'mnist'?"),
        ("emnist/balancd", "train", "did you mean 'emnist/balanced'?"),
        ("huggingface:mnist", "train", "no data set"),
        ("", "train", "no data set"),
        ("imdb_reviews", "train", "not for image classification"),
        # Whose supervised keys are no names.
        ("hillstrom", "train", "not for image classification"),
        ("digits", "trian", "the nearest is 'train'"),
        ("digits", "trian", "train (1,500 examples) and test (297 examples)"),
        ("digits", "train[", "'train['"),
        ("digits", "train[200%:]", "'train[200%:]'"),
        ("digits", "train[5000:]", "1500 examples"),
        ("digits", "train[1500:]", "no examples"),
        ("digits", "train[10:5]", "no examples"),
        ("digits", "train+test[297:]", "no examples"),
        ("digits", "", "malformed"),
        ("cifar10", "train[:", "malformed"),
    ],
)
def test_check_refuses(fresh, name, split, said):
    with pytest.raises(UserError) as error:
        datasets.check_split(name, split)
    assert said in one_sentence(error)
    assert list(fresh.iterdir()) == []


def test_check_accepts_without_preparing(fresh):
    for split in ("train", "train[5000:]", "train[90%:]", "train[:10%]+train[80%:]", "test"):
        datasets.check_split("mnist", split)
    datasets.check_split("cifar10", "test[:50%]")
    datasets.check_split("emnist/balanced", "train")
    assert list(fresh.iterdir()) == []


def idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes())[header:], np.uint8)


@pytest.mark.parametrize(("split", "file"), [("train", "train"), ("test", "t10k")])
def test_mnist_holds_the_examples_of_the_official_files(mnist, split, file):
    images = idx(mnist / f"{file}-images-idx3-ubyte.gz", 16).reshape(-1, 784)
    labels = idx(mnist / f"{file}-labels-idx1-ubyte.gz", 8)
    found = datasets.load("mnist", split)
    assert found.images.shape == (len(labels), 28, 28, 1)
    ours = np.column_stack([found.images.reshape(-1, 784), found.labels.astype(np.uint8)])
    theirs = np.column_stack([images, labels])
    assert sorted(row.tobytes() for row in ours) == sorted(row.tobytes() for row in theirs)
    assert not np.array_equal(found.labels, labels)  # TFDS shuffles what it prepares


def test_mnist_comes_in_the_order_that_tfds_documents(mnist):
    # The four examples that https://www.tensorflow.org/datasets/overview shows.
    assert datasets.load("mnist", "train[:4]").labels.tolist() == [4, 1, 0, 7]


def test_the_stock_builder_reads_the_mnist_prepared_here(mnist, prepared):
    stock = tfds.builder_cls("mnist")(data_dir=prepared)
    assert stock.is_prepared()
    source = stock.as_data_source("test[100:110]")
    found = datasets.load("mnist", "test[100:110]")
    np.testing.assert_array_equal(np.stack([e["image"] for e in source]), found.images)
    assert [int(e["label"]) for e in source] == found.labels.tolist()
    written = json.loads((prepared / "mnist/3.0.1/dataset_info.json").read_text())
    assert written["moduleName"] == "tensorflow_datasets.image_classification.mnist"
    assert written["downloadSize"] == str(9912422 + 28881 + 1648877 + 4542)
    names = {path.name for path in prepared.iterdir()}
    # Another process of the tests may be about to prepare something.
    names = {name for name in names if not name.startswith("incomplete.")}
    assert names <= {"digits", "mnist", "mnist_flax_cache"}


def test_the_manual_folder_can_come_from_the_environment(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("MNIST_FLAX_MANUAL_DIR", str(tmp_path / "from_environment"))
    with pytest.raises(UserError, match="from_environment does not exist"):
        datasets.load("mnist", "train")
    with pytest.raises(UserError, match="from_argument does not exist"):
        datasets.load("mnist", "train", manual_dir=str(tmp_path / "from_argument"))
    assert list(fresh.iterdir()) == []


def test_manual_files_missing_or_wrong_are_named(fresh, tmp_path):
    manual = tmp_path / "manual"
    manual.mkdir()
    with pytest.raises(UserError) as error:
        datasets.load("mnist", "train", manual_dir=str(manual))
    assert "train-images-idx3-ubyte.gz is missing" in one_sentence(error)
    for file in builders.GZ_NAMES:
        (manual / file).write_bytes(b"")
    with pytest.raises(UserError) as error:
        datasets.load("mnist", "train", manual_dir=str(manual))
    message = one_sentence(error)
    assert "train-images-idx3-ubyte.gz is not the official file" in message
    assert "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609 expected" in message
    # The SHA-256 of nothing.
    assert "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 found" in message
    assert list(fresh.iterdir()) == []


def test_a_manual_folder_of_somebody_else_is_named(fresh, tmp_path, monkeypatch):
    # Not chmod, as root may read everything.
    def refused(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(preparation, "_check_gz_files", refused)
    with pytest.raises(UserError, match=r"manual folder .* cannot be read \(Permission denied\)"):
        datasets.load("mnist", "train", manual_dir=str(tmp_path))


def test_a_manual_folder_of_an_unknown_user_is_named(fresh):
    with pytest.raises(UserError, match="manual folder ~no-such-user/mnist does not exist"):
        datasets.load("mnist", "train", manual_dir="~no-such-user/mnist")
    with pytest.raises(UserError, match="manual folder .*test_datasets.py is no folder"):
        datasets.load("mnist", "train", manual_dir=__file__)


def test_a_truncated_manual_file_is_named(fresh, mnist_gz, tmp_path):
    manual = tmp_path / "manual"
    shutil.copytree(mnist_gz, manual, copy_function=shutil.copyfile)
    manual.chmod(0o755)
    broken = manual / "t10k-images-idx3-ubyte.gz"
    os.truncate(broken, broken.stat().st_size - 1)
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte.gz is not the official file"):
        datasets.load("mnist", "train", manual_dir=str(manual))
    assert list(fresh.iterdir()) == []


def test_a_manual_folder_is_for_the_mnist_family_alone(fresh, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="not for digits"):
        datasets.load("digits", "train", manual_dir=str(tmp_path))
    # The environment speaks to every run, so that it forbids none.
    monkeypatch.setenv("MNIST_FLAX_MANUAL_DIR", str(tmp_path / "absent"))
    assert len(datasets.load("digits", "test").labels) == 297


def test_without_a_network_the_ways_out_are_named_at_once(fresh, monkeypatch):
    # A proxy on a port where nothing listens.
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        datasets.load("mnist", "train")
    message = one_sentence(error)
    assert "Connection refused" in message
    for way_out in ("py:digits", "data.manual_dir=DIR", "MNIST_FLAX_MANUAL_DIR", "TFDS_DATA_DIR"):
        assert way_out in message
    assert all(file in message for file in builders.GZ_NAMES)
    assert list(fresh.iterdir()) == []
    with pytest.raises(UserError, match="cifar10 .*Connection refused.*py:digits.*TFDS_DATA_DIR"):
        datasets.load("cifar10", "train")
    # TFDS by itself tries again for over three minutes.
    assert time.monotonic() - start < 90


def test_what_was_downloaded_is_verified(fresh, monkeypatch):
    class Response(io.BytesIO):
        content = b"<html>log in to the hotel's network</html>"

        def raise_for_status(self):
            pass

    monkeypatch.setattr(preparation.requests, "get", lambda url, timeout: Response())
    with pytest.raises(UserError, match="not the official file") as error:
        datasets.load("kmnist", "train")
    message = one_sentence(error)
    assert "train-images-idx3-ubyte.gz sent is not" in message and "manual_dir=DIR" in message
    # The files lay in a folder that is gone.
    assert str(fresh) not in message
    assert list(fresh.iterdir()) == []


def test_a_failed_preparation_leaves_nothing(fresh, monkeypatch):
    calls = []

    def fail_later(image):
        calls.append(1)
        if len(calls) == 1600:
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
        return Image.new("L", (28, 28))

    monkeypatch.setattr(builders, "_like_mnist", fail_later)
    with pytest.raises(UserError, match="needs TensorFlow.*TFDS_DATA_DIR"):
        datasets.load("digits", "train")
    assert len(calls) == 1600
    assert list(fresh.iterdir()) == []


def test_a_data_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("TFDS_DATA_DIR", str(blocked))
    with pytest.raises(UserError, match="file cannot be written.*TFDS_DATA_DIR"):
        datasets.load("digits", "train")


def test_two_processes_may_prepare_at_once(fresh):
    # The same seed, as TFDS names its folder of unfinished files by `random`.
    code = "import random; from mnist_flax import datasets; random.seed(0); "
    code += "print(datasets.load('digits', 'test').labels.sum())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    expected = str(load_digits().target[1500:].sum())
    assert [out.strip() for out, _ in outputs] == [expected] * 2, outputs
    assert {path.name for path in fresh.iterdir()} == {"digits", "mnist_flax_cache"}


def test_tensorflow_is_never_imported_and_tfds_keeps_quiet(fresh, tmp_path):
    # A TensorFlow that cannot be imported, in front of any that may be installed.
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('imported')")
    code = (
        "import sys; from mnist_flax import datasets; assert 'tensorflow_datasets' not in "
        "sys.modules; datasets.load('digits', 'train'); assert 'tensorflow' not in sys.modules"
    )
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == f"preparing digits/1.0.0 in {fresh}\n"


def test_tfrecord_is_read_in_the_order_of_its_shards(fresh):
    write_tfrecord_set(fresh, "mnist", "3.0.1", FIVE)
    found = datasets.load("mnist", "train")
    assert found.images.shape == (5, 28, 28, 1)
    assert found.images[:, 0, 0, 0].tolist() == [10, 20, 30, 40, 50]
    assert found.labels.tolist() == [1, 2, 3, 4, 5]
    assert datasets.load("mnist", "train[2:4]").labels.tolist() == [3, 4]
    assert datasets.load("mnist", "train[-20%:]").labels.tolist() == [5]
    assert datasets.load("mnist", "train[1shard]").labels.tolist() == [4, 5]


@pytest.mark.parametrize("cut", [1, 30])
def test_a_truncated_tfrecord_file_is_named(fresh, cut):
    folder = write_tfrecord_set(fresh, "mnist", "3.0.1", FIVE)
    path = folder / "mnist-train.tfrecord-00001-of-00002"
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(UserError, match="mnist-train.tfrecord-00001-of-00002 is truncated"):
        datasets.load("mnist", "train")


def test_a_tfrecord_file_with_a_record_too_few_is_noticed(fresh):
    folder = write_tfrecord_set(fresh, "mnist", "3.0.1", FIVE)
    shutil.copy(
        folder / "mnist-train.tfrecord-00001-of-00002",
        folder / "mnist-train.tfrecord-00000-of-00002",
    )
    with pytest.raises(UserError, match="4 examples found where 5 are expected"):
        datasets.load("mnist", "train")


def test_images_of_several_sizes_and_missing_labels_are_refused(fresh):
    colour = np.zeros((8, 9, 3), np.uint8)
    extra = {"image/filename": "cat.png"}
    shards = [[(colour, 0), (colour, 1)]]
    folder = write_tfrecord_set(fresh, "cats_vs_dogs", "4.0.1", shards, extra)
    assert datasets.load("cats_vs_dogs", "train").images.shape == (2, 8, 9, 3)
    shutil.rmtree(folder)
    shards = [[(colour, 0), (colour[:5], 1)]]
    write_tfrecord_set(fresh, "cats_vs_dogs", "4.0.1", shards, extra)
    with pytest.raises(UserError, match=r"differ in size \(\(8, 9, 3\) and \(5, 9, 3\)\)"):
        datasets.load("cats_vs_dogs", "train")
    write_tfrecord_set(fresh, "mnist", "3.0.1", [[(grey(1), -1)]])
    with pytest.raises(UserError, match="an example of mnist has no label"):
        datasets.load("mnist", "train")


def test_colour_images_of_two_classes_are_trained_on_outside_the_main_thread(fresh, tmp_path):
    rng = np.random.default_rng(0)
    shard = [(rng.integers(0, 256, (12, 9, 3), np.uint8), i % 2) for i in range(40)]
    write_tfrecord_set(fresh, "cats_vs_dogs", "4.0.1", [shard], {"image/filename": "cat.png"})
    config = config_lib.recipe("x", "cats_vs_dogs", model="baseline", batch_size=20, epochs=1)
    config.data.update(test_split="train", watch_split="")
    with (
        ThreadPoolExecutor() as pool,
        pytest.warns(UserWarning, match="train and train share images"),
    ):
        summary = pool.submit(train.train_and_evaluate, config, tmp_path / "run").result()
    assert summary["train_examples"] == 40
    run = trained.load(tmp_path / "run")
    assert (run.image_shape, run.model.num_classes) == ((12, 9, 3), 2)
    probabilities = run.predict(datasets.load("cats_vs_dogs", "train").images)
    right = probabilities.argmax(1) == [label for _, label in shard]
    assert run.evaluate()["accuracy"] == right.mean()


def test_a_folder_without_a_data_set_is_named(fresh):
    (fresh / "mnist/3.0.1").mkdir(parents=True)
    (fresh / "mnist/3.0.1/dataset_info.json").write_text('{"name": "mnist", "version": "3.0.1"}')
    with pytest.raises(UserError, match="3.0.1 is not a prepared data set: delete"):
        datasets.load("mnist", "train")
    (fresh / "digits/1.0.0").mkdir(parents=True)
    (fresh / "digits/1.0.0/digits-train.array_record-00000-of-00001").touch()
    with pytest.raises(UserError, match="1.0.0 is not a prepared data set: delete"):
        datasets.load("digits", "train")


def test_a_file_where_a_data_set_should_be_is_named(fresh):
    (fresh / "digits").mkdir()
    (fresh / "digits/1.0.0").touch()
    with pytest.raises(UserError, match=r"1.0.0 cannot be read \(Not a directory\)"):
        datasets.load("digits", "train")


def test_asking_for_a_data_set_leaves_nothing_in_the_temporary_folder(fresh, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(fresh))
    builders.create("cifar10", fresh)
    assert not list(fresh.iterdir())


def test_a_set_that_another_process_prepares_meanwhile_is_used(fresh, capfd):
    late = builders.create("digits", fresh)
    expected = datasets.load("digits", "test")
    capfd.readouterr()
    found = decoding.decode(preparation.prepare("digits", late, None), "test")
    np.testing.assert_array_equal(found[0], expected.images)
    assert capfd.readouterr().err == ""


def test_a_split_is_decoded_once(fresh, monkeypatch):
    write_tfrecord_set(fresh, "mnist", "3.0.1", FIVE)
    first = datasets.load("mnist", "train")
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("decoded again"))
    second = datasets.load("mnist", "train")
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert (second.images.dtype, second.labels.dtype) == (np.uint8, np.int32)
    cached = {path.name for path in (fresh / "mnist_flax_cache/mnist-3.0.1").iterdir()}
    assert cached == {"train.json", "train_images.npy", "train_labels.npy"}


def test_the_cache_follows_a_data_set_that_is_prepared_again(fresh):
    write_tfrecord_set(fresh, "mnist", "3.0.1", FIVE)
    assert datasets.load("mnist", "train[:2]").labels.tolist() == [1, 2]
    folder = write_tfrecord_set(fresh, "mnist", "3.0.1", [FIVE[0][::-1], FIVE[1]])
    assert datasets.load("mnist", "train[:2]").labels.tolist() == [3, 2]
    # Or of which a file alone is written again.
    described = (folder / "dataset_info.json").stat()
    write_tfrecord_set(fresh, "mnist", "3.0.1", [FIVE[0], FIVE[1]])
    times = (described.st_atime_ns, described.st_mtime_ns)
    os.utime(folder / "dataset_info.json", ns=times)
    assert datasets.load("mnist", "train[:2]").labels.tolist() == [1, 2]
    # Or that was decoded by an earlier version.
    record = fresh / "mnist_flax_cache/mnist-3.0.1/train.json"
    record.write_text(record.read_text().replace(f'"{datasets._FORMAT} ', '"'))
    images = fresh / "mnist_flax_cache/mnist-3.0.1/train_images.npy"
    before = images.stat().st_ino
    datasets.load("mnist", "train")
    assert images.stat().st_ino != before


@pytest.mark.parametrize("file", ["train.json", "train_images.npy", "train_labels.npy"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "header", "removed"])
def test_a_damaged_cache_is_made_again(fresh, file, damage):
    write_tfrecord_set(fresh, "mnist", "3.0.1", FIVE)
    expected = datasets.load("mnist", "train")
    path = fresh / "mnist_flax_cache/mnist-3.0.1" / file
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "header":
        # Of an array NumPy takes it for Python, which it parses.
        content = path.read_bytes()
        path.write_bytes(content.replace(b"}", b" ", 1))
    elif damage == "overwritten":
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    else:
        path.unlink()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        again = datasets.load("mnist", "train")
    # Without its record there is no cache, which is nothing to speak of.
    assert ["damaged" in str(w.message) for w in said] == (
        [] if (file, damage) == ("train.json", "removed") else [True]
    )
    np.testing.assert_array_equal(again.images, expected.images)
    np.testing.assert_array_equal(again.labels, expected.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        datasets.load("mnist", "train")


def test_a_cache_that_cannot_be_written_costs_one_warning(fresh):
    write_tfrecord_set(fresh, "mnist", "3.0.1", FIVE)
    (fresh / "mnist_flax_cache").touch()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        for _ in range(2):
            found = datasets.load("mnist", "train")
    assert found.labels.tolist() == [1, 2, 3, 4, 5]
    assert ["not kept" in str(warning.message) for warning in said] == [True]


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist", "kmnist:3.0.1"])
@pytest.mark.parametrize("downloaded", [False, True])
def test_the_rest_of_the_mnist_family_is_prepared_from_its_files(
    fresh, tmp_path, monkeypatch, name, downloaded
):
    rng = np.random.default_rng(0)
    builder_class = builders._idx_builder_class(name.partition(":")[0])
    examples, url_infos = {}, {}
    for split, size in (("train", 12), ("test", 5)):
        images = rng.integers(0, 256, (size, 28, 28), np.uint8)
        labels = rng.integers(0, 10, size, np.uint8)
        examples[split] = {(i.tobytes(), int(k)) for i, k in zip(images, labels, strict=True)}
        image_file, label_file = builders.IDX_FILES[split]
        headers = struct.pack(">4I", 0x803, size, 28, 28), struct.pack(">2I", 0x801, size)
        for file, header, array in zip(
            (image_file, label_file), headers, (images, labels), strict=True
        ):
            content = gzip.compress(header + array.tobytes())
            (tmp_path / file).write_bytes(content)
            url_infos[urljoin(builder_class.URL, file)] = UrlInfo(
                len(content), hashlib.sha256(content).hexdigest(), file
            )
    # The real files are not at hand; what stands in for them has checksums of its own.
    monkeypatch.setattr(builder_class, "url_infos", url_infos)

    def get(url, timeout):
        response = requests.Response()
        response.status_code = 200
        response._content = (tmp_path / url.rpartition("/")[2]).read_bytes()
        return response

    if downloaded:
        monkeypatch.setattr(preparation.requests, "get", get)
    for split, expected in examples.items():
        found = datasets.load(name, split, manual_dir="" if downloaded else str(tmp_path))
        pairs = zip(found.images[..., 0], found.labels, strict=True)
        assert {(image.tobytes(), int(label)) for image, label in pairs} == expected


def test_images_of_16_bits_are_refused():
    features = tfds.features
    label = features.ClassLabel(num_classes=2)

    def keys(dtype):
        image = features.Image(shape=(8, 8, 1), dtype=dtype)
        both = features.FeaturesDict({"image": image, "label": label})
        info = SimpleNamespace(features=both, supervised_keys=None)
        return builders.feature_keys(SimpleNamespace(name="x_rays", info=info))

    assert keys(np.uint8) == ("image", "label")
    with pytest.raises(UserError, match="'x_rays' is not for .*it needs an 8-bit image"):
        keys(np.uint16)


def test_a_slice_over_splits_of_two_sizes_is_refused(monkeypatch):
    def whole(builder, split):
        size = 28 if split == "train" else 27
        return datasets.Arrays(np.zeros((2000, 28, size, 1), np.uint8), np.zeros(2000, np.int32))

    monkeypatch.setattr(datasets, "_whole_split", whole)
    assert len(datasets.load("digits", "train[:3]+train[9:10]").labels) == 4
    with pytest.raises(UserError, match="the images of digits differ in size: take splits of one"):
        datasets.load("digits", "train[:3]+test[:1]")


def test_data_lies_where_tfds_keeps_it(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets._data_dir() == tmp_path / "tensorflow_datasets"
    # Which is TFDS's own default.
    assert str(tfds.core.constants.DATA_DIR).endswith("/tensorflow_datasets")


def test_what_has_to_be_installed_to_read_a_data_set_is_named(monkeypatch):
    def as_data_source(builder, split, decoders):
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", as_data_source)
    with pytest.raises(UserError, match=r"digits cannot be read .*: install pyarrow$"):
        datasets.open_slice("digits", "train")


def encoded(image, file_format="PNG"):
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_images_are_decoded_whatever_their_files_hold(mode, channels):
    image = COLOURS.convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(np.arange(72, dtype=np.uint8).reshape(8, 9)))
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    found = decoding._pixels(data, channels)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    assert found.dtype == np.uint8 and found.shape == (8, 9, channels)
    np.testing.assert_array_equal(found, expected.reshape(8, 9, channels))


def test_pixels_of_16_bits_lose_the_lower_ones_and_of_32_are_refused():
    wide = np.arange(72, dtype=np.uint16).reshape(8, 9) * 900
    found = decoding._pixels(encoded(Image.fromarray(wide)), 1)
    np.testing.assert_array_equal(found[..., 0], wide // 256)
    with pytest.raises(ValueError, match="pixels of 32 bits"):
        decoding._pixels(encoded(Image.fromarray(wide.astype(np.float32)), "TIFF"), 1)


@pytest.mark.parametrize("loader", ["resident", "stream"])
def test_images_of_one_bit_are_black_and_white(loader, fresh):
    bits = Image.fromarray(np.eye(28, dtype=bool))
    write_tfrecord_set(fresh, "mnist", "3.0.1", [[(io.BytesIO(encoded(bits)), 1)]])
    if loader == "resident":
        images = datasets.load("mnist", "train").images
    else:
        images, _ = datasets.open_slice("mnist", "train").read(np.array([0]))
    np.testing.assert_array_equal(images[0, :, :, 0], 255 * np.eye(28))


def test_the_cache_lies_beside_the_data_sets(fresh, monkeypatch):
    # As TFDS says of a set that it knows by its folder alone.
    own = property(lambda builder: builder.data_dir)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "data_dir_root", own)
    folder = write_tfrecord_set(fresh, "mnist", "3.0.1", FIVE)
    before = sorted(folder.iterdir())
    datasets.load("mnist", "train")
    assert (fresh / "mnist_flax_cache/mnist-3.0.1").is_dir()
    assert sorted(folder.iterdir()) == before


def test_what_cannot_be_prepared_anew_is_not_to_be_deleted(fresh):
    shard = [(np.zeros((8, 9, 3), np.uint8), 0)]
    extra = {"image/filename": "cat.png"}
    folder = write_tfrecord_set(fresh, "cats_vs_dogs", "4.0.1", [shard], extra)
    (path,) = folder.glob("*.tfrecord*")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match="is truncated.: try again, or restore it from where"):
        datasets.load("cats_vs_dogs", "train")


@pytest.mark.parametrize("expected", [1499, 1501])
def test_files_and_description_must_agree_before_anything_is_read(fresh, expected):
    datasets.load("digits", "test")
    path = fresh / "digits/1.0.0/dataset_info.json"
    path.write_text(path.read_text().replace('"1500"', f'"{expected}"'))
    with pytest.raises(UserError, match=f"1500 examples found where {expected} are expected"):
        datasets.open_slice("digits", "train")


def test_a_full_disk_wants_room():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert builders.explain("mnist", "prepare", full).endswith(
        "(No space left on device): make room there and start again"
    )


def test_one_thread_at_a_time_keeps_tfds_quiet():
    with ThreadPoolExecutor() as pool, builders.quiet():
        assert not pool.submit(builders._STDOUT.acquire, blocking=False).result()
        with builders.quiet():
            pass


def test_every_split_is_looked_at_before_one_is_decoded(monkeypatch):
    config = config_lib.recipe("x", "digits")
    config.data.test_split = "tset"
    monkeypatch.setattr(loaders, "create", None)
    with pytest.raises(UserError, match="the split 'tset' of digits cannot be used"):
        parts.load_data(config, parallel.single_mesh())


def test_a_version_that_lies_there_can_be_named(fresh):
    shard = [(np.zeros((8, 9, 3), np.uint8), 0)]
    extra = {"image/filename": "cat.png"}
    folder = write_tfrecord_set(fresh, "cats_vs_dogs", "4.0.0", [shard], extra)
    tfds.builder("cats_vs_dogs").info.features.save_config(folder)
    assert datasets.load("cats_vs_dogs:4.0.0", "train").images.shape == (1, 8, 9, 3)
    assert config_lib.recipe("larger", "cats_vs_dogs:4.0.0").name == "larger-cats_vs_dogs-4.0.0"
    with pytest.raises(UserError, match="cats_vs_dogs:4.0.9"):
        datasets.load("cats_vs_dogs:4.0.9", "train")


def test_another_version_of_the_mnist_family_is_read_where_it_lies(fresh):
    folder = write_tfrecord_set(fresh, "mnist", "3.0.0", FIVE)
    tfds.builder("mnist").info.features.save_config(folder)
    assert datasets.load("mnist:3.0.0", "train").labels.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="mnist:2.0.0"):
        datasets.load("mnist:2.0.0", "train")
