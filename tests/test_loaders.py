import io
import os

import grain
import jax
import numpy as np
import pytest
from PIL import Image

from mnist_flax import builders, datasets, decoding, environment, loaders, parallel, steps
from mnist_flax import config as config_lib
from mnist_flax.errors import UserError
from tests.test_datasets import FIVE, write_tfrecord_set

# 120 examples in three batches of 50; the last is padded, and two examples come twice.
ROWS = np.array([*range(119, -1, -1), 3, 3, *[-1] * 28], np.int32).reshape(3, 1, 50)


@pytest.fixture(scope="module")
def streamed(prepared):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(prepared))
        return create("stream", "digits", "train[:100]+test[10:30]")


@pytest.fixture(scope="module")
def resident(prepared):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(prepared))
        return create("resident", "digits", "train[:100]+test[10:30]")


def create(loader, name, split):
    return loaders.create(loader, name, split, "", parallel.single_mesh())


def batches_of(loader, length, rows=ROWS):
    gather = jax.jit(steps.gather)
    return [
        gather(piece.images, piece.labels, row)
        for piece in loader.pieces(rows, length)
        for row in piece.rows[:, 0]
    ]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_both_loaders_give_the_same_batches(resident, streamed, length):
    expected = batches_of(resident, 3)
    for batch, other in zip(batches_of(streamed, length), expected, strict=True):
        np.testing.assert_array_equal(batch.mask, other.mask)
        kept = np.flatnonzero(batch.mask)
        np.testing.assert_array_equal(batch.images[kept], other.images[kept])
        np.testing.assert_array_equal(batch.labels[kept], other.labels[kept])
    assert sum(int(batch.mask.sum()) for batch in expected) == 122


def test_a_stream_decodes_an_example_once_a_piece(streamed, monkeypatch):
    read, asked = streamed._examples.read, []
    monkeypatch.setattr(
        streamed._examples, "read", lambda indices: asked.append(len(indices)) or read(indices)
    )
    batches_of(streamed, 3)
    assert asked == [120]


def test_a_device_gets_its_share_of_a_stream_and_no_more(prepared):
    arrays = datasets.load("digits", "train[:120]")
    config = config_lib.default()
    config.num_seeds, config.parallel = 2, 4
    mesh = parallel.create_mesh(config)
    assert mesh.devices.shape == (2, 2)
    # Two seeds, whose batches of 25 are filled up to 26.
    rows = np.concatenate([ROWS.reshape(6, 1, 25), ROWS[::-1].reshape(6, 1, 25)], axis=1)
    padded = np.pad(rows, [(0, 0), (0, 0), (0, 1)], constant_values=-1)
    loader = loaders.create("stream", "digits", "train[:120]", "", mesh)
    done = 0
    for piece in loader.pieces(rows, 4):
        part = padded[done : done + 4]
        done += len(part)
        images, labels, given = (
            {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}
            for array in piece
        )
        for seed, share in np.ndindex(2, 2):
            device = mesh.devices[seed, share]
            expected = part[:, seed, 13 * share : 13 * share + 13]
            assert len(images[device]) == len(labels[device]) == expected.size
            found = given[device][:, 0]
            np.testing.assert_array_equal(found < 0, expected < 0)
            kept = found[found >= 0]
            np.testing.assert_array_equal(
                images[device][kept], arrays.images[expected[expected >= 0]]
            )
            np.testing.assert_array_equal(
                labels[device][kept], arrays.labels[expected[expected >= 0]]
            )
    assert done == 6


@pytest.mark.parametrize("name", loaders.NAMES)
def test_pieces_have_the_shapes_that_were_compiled_for(name, resident, streamed):
    loader = {"resident": resident, "stream": streamed}[name]
    assert (loader.size, loader.image_shape) == (120, (28, 28, 1))
    found = [(a.shape, a.dtype) for piece in loader.pieces(ROWS, 2) for a in piece]
    expected = [(a.shape, a.dtype) for n in (2, 1) for a in loader.abstract(n, 1, 50)]
    assert found == expected


@pytest.mark.parametrize("at_once", [1, 3, 256])
def test_a_stream_reads_what_is_asked_for_in_that_order(streamed, monkeypatch, at_once):
    monkeypatch.setattr(decoding, "_AT_ONCE", at_once)
    arrays = datasets.load("digits", "train[:100]+test[10:30]")
    examples = datasets.open_slice("digits", "train[:100]+test[10:30]")
    assert len(examples) == 120
    indices = np.array([119, 0, 99, 100, 7, 7, 101])
    images, labels = examples.read(indices)
    np.testing.assert_array_equal(images, arrays.images[indices])
    np.testing.assert_array_equal(labels, arrays.labels[indices])
    assert streamed.max_examples == 64 * 2**20 // 784


def png(height, width):
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


class Source(list):
    """As TFDS's data sources, it gives several examples at once."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_a_slice_is_cut_here_as_tfds_may_take_all_of_a_shard(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    expected = datasets.load("digits", "train[90:]+train[10:20]")
    as_data_source = decoding.tfds.core.DatasetBuilder.as_data_source

    def without_slices(builder, split, decoders):
        return as_data_source(builder, split.partition("[")[0], decoders=decoders)

    monkeypatch.setattr(decoding.tfds.core.DatasetBuilder, "as_data_source", without_slices)
    examples = datasets.open_slice("digits", "train[90:]+train[10:20]")
    found = examples.read(np.arange(len(examples)))
    jax.tree.map(np.testing.assert_array_equal, found, tuple(expected))


def test_files_with_fewer_examples_than_they_should_have_are_refused(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    lost = Source([{"image": png(28, 28), "label": 0}] * 2)
    monkeypatch.setattr(
        decoding.tfds.core.DatasetBuilder, "as_data_source", lambda builder, split, decoders: lost
    )
    with pytest.raises(UserError, match="2 examples found where 1500 are expected"):
        datasets.open_slice("digits", "train[:2]")


def test_images_of_another_size_stop_a_stream(tmp_path):
    sizes = [(2, 2), (2, 2), (3, 2)]
    source = Source({"image": png(*size), "label": 0} for size in sizes)
    examples = decoding.Examples(builders.create("digits", tmp_path), [(source, 0, 3)])
    assert examples.read(np.arange(2))[0].shape == (2, 2, 2, 1)
    later = decoding.Examples(builders.create("digits", tmp_path), [(source, 2, 3)])
    assert later.image_shape == (3, 2, 1)
    mesh, rows = parallel.single_mesh(), np.arange(3, dtype=np.int32).reshape(1, 1, 3)
    with pytest.raises(UserError, match=r"digits differ in size \(\(2, 2, 1\) and \(3, 2, 1\)\)"):
        list(loaders.Streamed(examples, mesh).pieces(rows, 1))


def test_tfrecord_is_streamed_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    folder = write_tfrecord_set(tmp_path, "mnist", "3.0.1", FIVE)
    # The images of grey values 50, 20, 30, 40; of the first shard one is left out.
    loader = create("stream", "mnist", "train[4:]+train[1:4]")
    rows = np.array([3, 0, 2, -1, 1, 0], np.int32).reshape(2, 1, 3)
    found = [(batch, np.flatnonzero(batch.mask)) for batch in batches_of(loader, 2, rows)]
    assert [batch.labels[kept].tolist() for batch, kept in found] == [[4, 5, 3], [2, 5]]
    greys = [np.round(batch.images[kept, 0, 0, 0] * 255).tolist() for batch, kept in found]
    assert greys == [[40, 50, 30], [20, 50]]
    os.truncate(folder / "mnist-train.tfrecord-00001-of-00002", 20)
    with pytest.raises(UserError, match="mnist cannot be read .*00001-of-00002 is truncated"):
        create("stream", "mnist", "train")


def test_a_slice_says_what_it_takes_before_it_is_read(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    # Splits are read as wholes, each once.
    assert datasets.image_bytes("digits", "train[:100]") == (100 * 784, 1500 * 784)
    several = "train[:100]+train[200:210]+test[10:30]"
    assert datasets.image_bytes("digits", several) == (130 * 784, (1500 + 297) * 784)
    # Where the size is not declared, by the first image.
    monkeypatch.setattr(decoding.tfds.features.Image, "shape", (None, None, 1))
    assert datasets.image_bytes("digits", several) == (130 * 784, (1500 + 297) * 784)
    monkeypatch.undo()
    host, device = environment.free_memory()
    assert host > 2**20 and device is None


@pytest.mark.parametrize(
    ("host", "device", "copies", "named"),
    [
        ((1500 + 60) * 784, None, 1, "this machine"),
        ((1500 + 60) * 784, None, 2, "this machine"),
        (1500 * 784, 60 * 784, 2, "cpu"),
        (1500 * 784, 60 * 784, 2, "this machine"),
    ],
)
def test_data_that_does_not_fit_is_refused(monkeypatch, prepared, host, device, copies, named):
    mesh = jax.make_mesh((copies,), (parallel.BATCH,), devices=jax.devices()[:copies])
    monkeypatch.setattr(environment, "free_memory", lambda: (host, device))
    loaders.create("resident", "digits", "train[:60]", "", mesh)
    less = (host - 1, device) if named == "this machine" else (host, device - 1)
    monkeypatch.setattr(environment, "free_memory", lambda: less)
    monkeypatch.setattr(datasets, "load", None)
    ways_out = "train with data.loader=stream"
    if less[0] >= 1500 * 784:
        ways_out += r", or name a smaller slice than train\[:60\]"
    with pytest.raises(UserError, match=f"{named}.* 0.0 GiB free: {ways_out}$"):
        loaders.create("resident", "digits", "train[:60]", "", mesh)


@pytest.mark.parametrize("shape", [(1, 4), (2, 2)])
def test_the_devices_of_a_cpu_share_one_copy_of_the_data(shape):
    mesh = parallel._mesh(jax.devices()[:4], shape)
    # Not where a copy would be needed, and changed afterwards.
    images = np.ones(501 * 784 + 1, np.uint8)[1:].reshape(501, 28, 28, 1)
    given = datasets.Arrays(images, np.arange(501, dtype=np.int32))
    (piece,) = loaders.Resident(given, mesh).pieces(np.zeros((1, 2, 4), np.int32), 1)
    images[:] = 2
    assert (piece.images == 1).all() and (piece.labels == np.arange(501)).all()
    for array in (piece.images, piece.labels):
        shards = array.addressable_shards
        assert len(shards) == 4
        assert len({shard.data.unsafe_buffer_pointer() for shard in shards}) == 1


def test_a_stream_refuses_what_cannot_be_read_or_has_no_label(tmp_path):
    class Damaged(Source):
        def __getitem__(self, index):
            if index == 2:
                raise ValueError("truncated record")
            return super().__getitem__(index)

    source = Damaged({"image": png(2, 2), "label": label} for label in (4, -1, 0, 10))
    examples = decoding.Examples(builders.create("digits", tmp_path), [(source, 0, 4)])
    assert examples.read(np.array([0]))[1] == [4]
    unreadable = r"digits cannot be read \(truncated record\): try again"
    no_class = "digits has the label 10, and there are 10 classes, from 0"
    for index, message in ((1, "digits has no label"), (2, unreadable), (3, no_class)):
        with pytest.raises(UserError, match=message):
            examples.read(np.array([0, index]))
        rows = np.array([[[0, index]]], np.int32)
        with pytest.raises(UserError, match=message):
            list(loaders.Streamed(examples, parallel.single_mesh()).pieces(rows, 1))


def test_a_stream_holds_a_few_pieces_and_no_more(streamed, monkeypatch):
    held, prefetch = [], grain.experimental.ThreadPrefetchIterDataset

    def counted(parent, prefetch_buffer_size):
        held.append(prefetch_buffer_size)
        return prefetch(parent, prefetch_buffer_size=prefetch_buffer_size)

    monkeypatch.setattr(grain.experimental, "ThreadPrefetchIterDataset", counted)
    assert len(list(streamed.pieces(ROWS, 1))) == 3
    # One that is read and one that is sent, beside the one that is trained on.
    assert held == [1, 1]
