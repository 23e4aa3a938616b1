import errno
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnist_flax import checkpoint, files, models, optim, parallel
from mnist_flax.errors import UserError
from mnist_flax.state import num_updates
from tests.helpers import random_state


@pytest.fixture(scope="module")
def start():
    tx = optim.create("adam", optax.constant_schedule(1e-3))
    return random_state(models.create("larger"), tx)


def at(state, step):
    """A state that shows its step in every parameter, and compresses badly.

    So a flipped byte is no damage that decompressing would notice.
    """
    params = jax.tree.map(lambda a: a + step, state.params)
    # A copy throughout, as one test donates it.
    return jax.tree.map(jnp.copy, state.replace(step=jnp.asarray(step, jnp.int32), params=params))


def saved(folder, start, accuracies):
    with checkpoint.open_manager(folder) as manager:
        for step, accuracy in enumerate(accuracies, start=1):
            checkpoint.save(manager, at(start, step), {"note": step}, accuracy)
    return folder


def restore(folder, start, step=None):
    with checkpoint.open_manager(folder, read_only=True) as manager:
        return checkpoint.restore(manager, lambda record: start, step)


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_state_and_record_come_back(tmp_path, start):
    folder = saved(tmp_path / "c", start, [None])
    state, record = restore(folder, start)
    assert record == {"note": 1}
    assert type(state) is type(start)
    assert_equal(state, at(start, 1))
    # An abstract state will do, as where a run is loaded to predict.
    state, _ = restore(folder, jax.eval_shape(lambda: start))
    assert_equal(state, at(start, 1))


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_devices_share_is_written_once(tmp_path, start, seeds):
    mesh = jax.make_mesh((seeds, 4 // seeds), (parallel.SEEDS, parallel.BATCH))
    shared_out = parallel.replicated_sharding(mesh)
    if seeds > 1:
        start = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), start)
        shared_out = parallel.seeds_sharding(mesh)
    state = jax.device_put(start, shared_out)
    with checkpoint.open_manager(tmp_path / "c") as manager:
        checkpoint.save(manager, state, {})
        manager.wait_until_finished()
        written = manager.item_metadata(num_updates(state))["state"]
    leaves = jax.tree.leaves(written, is_leaf=lambda leaf: hasattr(leaf, "storage"))
    assert len(leaves) == len(jax.tree.leaves(state))
    for leaf in leaves:
        assert leaf.storage.write_shape == (leaf.shape if seeds == 1 else (1, *leaf.shape[1:]))
    restored, _ = restore(tmp_path / "c", state)
    assert_equal(restored, state)
    assert all(leaf.sharding == shared_out for leaf in jax.tree.leaves(restored))


def test_an_empty_folder_has_nothing_to_restore(tmp_path, start):
    with checkpoint.open_manager(tmp_path / "c") as manager:
        assert checkpoint.restore(manager, lambda record: start) is None


def test_the_two_latest_and_the_best_are_kept(tmp_path, start):
    folder = saved(tmp_path / "c", start, [0.5, 0.9, 0.8, 0.7, 0.6])
    assert steps_in(folder) == [2, 4, 5]
    assert_equal(restore(folder, start)[0], at(start, 5))
    assert_equal(restore(folder, start, step=2)[0], at(start, 2))
    with pytest.raises(UserError, match=r"no checkpoint of step 3: it has \[5, 4, 2\]"):
        restore(folder, start, step=3)


def test_without_a_metric_the_two_latest_are_kept(tmp_path, start):
    assert steps_in(saved(tmp_path / "c", start, [None] * 4)) == [3, 4]


def test_a_state_may_be_donated_while_it_is_saved(tmp_path, start):
    state = at(start, 1).replace(opt_state=jnp.arange(4_000_000.0))
    expected = jax.tree.map(np.array, state)
    advance = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    with checkpoint.open_manager(tmp_path / "c") as manager:
        checkpoint.save(manager, state, {})
        for _ in range(10):
            state = advance(state)
    assert_equal(restore(tmp_path / "c", expected)[0], expected)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_byte(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda folder: os.truncate(largest_file(folder), 1000),
    "flipped byte": flip_a_byte,
    "no manifest": lambda folder: (folder / "state/manifest.ocdbt").unlink(),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "truncated record": lambda folder: os.truncate(folder / "record/metadata", 3),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path, start, damage):
    folder = saved(tmp_path / "c", start, [None, None])
    DAMAGES[damage](folder / "2")
    with pytest.warns(UserWarning, match="checkpoint 2 is damaged and passed over"):
        state, record = restore(folder, start)
    assert_equal(state, at(start, 1))
    assert record == {"note": 1}
    # The run that goes on from there replaces it, and puts it aside.
    with checkpoint.open_manager(folder) as manager:
        checkpoint.put_aside(manager, 1)
        checkpoint.save(manager, at(start, 2), {"note": 2})
    assert len([*folder.glob("2.damaged-*")]) == 1
    assert_equal(restore(folder, start)[0], at(start, 2))


@pytest.mark.parametrize("text", ["", "{}", '{"watch_accuracy": null}'])
def test_a_damaged_accuracy_costs_no_checkpoint_but_its_place_as_the_best(tmp_path, start, text):
    folder = saved(tmp_path / "c", start, [0.5, 0.9, 0.8, 0.7])
    (folder / "2/metrics/metrics").write_text(text)
    assert restore(folder, start)[1] == {"note": 4}
    assert restore(folder, start, step=2)[1] == {"note": 2}
    with (
        pytest.warns(UserWarning, match="the accuracy in checkpoint 2 is damaged"),
        checkpoint.open_manager(folder) as manager,
    ):
        assert checkpoint.restore(manager, lambda record: start)[1] == {"note": 4}
        checkpoint.save(manager, at(start, 5), {"note": 5}, 0.6)
        checkpoint.save(manager, at(start, 6), {"note": 6}, 0.6)
    assert steps_in(folder) == [3, 5, 6]


def test_an_accuracy_that_cannot_be_read_now_is_kept(tmp_path, start):
    metrics = saved(tmp_path / "c", start, [0.5]) / "1/metrics/metrics"
    metrics.unlink()
    metrics.mkdir()
    with (
        pytest.raises(UserError, match="metrics cannot be read"),
        checkpoint.open_manager(tmp_path / "c"),
    ):
        pass
    assert metrics.exists()


def test_no_room_for_a_checkpoint_is_said_and_costs_none(tmp_path, start, monkeypatch):
    folder = saved(tmp_path / "c", start, [None])
    free = sum(leaf.nbytes for leaf in jax.tree.leaves(start))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with (
        checkpoint.open_manager(folder) as manager,
        pytest.raises(UserError, match=r"takes 1.7 MiB, and 0.7 MiB are free .* make room there"),
    ):
        checkpoint.save(manager, at(start, 2), {"note": 2})
    assert restore(folder, start)[1] == {"note": 1}


@pytest.mark.parametrize("when", ["save", "close"])
def test_a_save_that_fails_is_said(tmp_path, start, monkeypatch, when):
    def fail(self, *args, **kwargs):
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "key/0"\nand much more')

    close = checkpoint.ocp.CheckpointManager.close
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, when, fail)
    message = r"cannot be written to .*c \(RESOURCE_EXHAUSTED: Error writing \"key/0\"\): make room"
    with (
        pytest.raises(UserError, match=message),
        checkpoint.open_manager(tmp_path / "c") as manager,
    ):
        checkpoint.save(manager, at(start, 1), {})
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "close", close)
    manager.close()


def test_damaged_later_checkpoints_do_not_count_as_the_latest(tmp_path, start):
    folder = saved(tmp_path / "c", start, [None, None])
    with checkpoint.open_manager(folder) as manager:
        checkpoint.save(manager, at(start, 10), {})
    for step in ("2", "10"):
        flip_a_byte(folder / step)
    with checkpoint.open_manager(folder) as manager:
        checkpoint.put_aside(manager, 2)
        checkpoint.save(manager, at(start, 3), {"note": 3})
    assert steps_in(folder) == [2, 3]


def test_a_checkpoint_is_on_the_disk_before_the_next_is_saved(tmp_path, start, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", lambda folder: synced.append(int(folder.name)))
    named = []
    monkeypatch.setattr(files, "sync_one", named.append)
    with checkpoint.open_manager(tmp_path / "c") as manager:
        checkpoint.save(manager, at(start, 1), {})
        assert not synced
        checkpoint.save(manager, at(start, 2), {})
        assert (synced, named) == ([1], [tmp_path / "c"])
    assert (synced, named) == ([1, 2], [tmp_path / "c"] * 2)


def test_all_of_a_folder_is_synced(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").touch()
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    files.sync(tmp_path / "a")
    assert synced == [str(tmp_path / path) for path in ("a", "a/b", "a/b/c")]

    def of_files_alone(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    # Where folders have no fsync.
    monkeypatch.setattr(os, "fsync", of_files_alone)
    files.sync(tmp_path / "a")
    assert synced[3:] == [str(tmp_path / "a/b/c")]

    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match="Input/output error"):
        files.sync(tmp_path / "a")


def test_checkpoints_that_a_run_deletes_meanwhile_are_not_damaged(tmp_path, start, recwarn):
    folder = saved(tmp_path / "c", start, [None, None])
    with checkpoint.open_manager(folder, read_only=True) as reader:
        assert sorted(reader.all_steps()) == [1, 2]
        with checkpoint.open_manager(folder) as manager:
            for step in (3, 4):
                checkpoint.save(manager, at(start, step), {"note": step})
        assert checkpoint.restore(reader, lambda record: start)[1] == {"note": 4}
        with pytest.raises(UserError, match=r"no checkpoint of step 1: it has \[4, 3\]"):
            checkpoint.restore(reader, lambda record: start, 1)
    assert not [w for w in recwarn if "damaged" in str(w.message)]


def test_what_a_save_left_that_was_cut_short_is_cleaned_up(tmp_path, start):
    folder = saved(tmp_path / "c", start, [None])
    (folder / "2.orbax-checkpoint-tmp").mkdir()
    with checkpoint.open_manager(folder):
        pass
    assert not (folder / "2.orbax-checkpoint-tmp").exists()


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(tmp_path, start):
    folder = saved(tmp_path / "c", start, [None, None])
    flip_a_byte(folder / "1")
    with pytest.raises(UserError, match=r"checkpoint 1 in .* is damaged .*another of \[2, 1\]"):
        restore(folder, start, step=1)


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        MemoryError(),
        ValueError("PERMISSION_DENIED: Error opening local file"),
        ValueError("UNKNOWN: Error reading local file [OS error 5: EIO Input/output error]"),
        jax.errors.JaxRuntimeError("INTERNAL: the device failed"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_at_the_moment_is_kept(tmp_path, start, error):
    def fail(record):
        raise error

    folder = saved(tmp_path / "c", start, [None, None])
    with (
        checkpoint.open_manager(folder) as manager,
        pytest.raises(UserError, match="checkpoint 2 in .* cannot be read at the moment .*move it"),
    ):
        checkpoint.restore(manager, fail)
    assert restore(folder, start)[1] == {"note": 2}


def test_a_folder_that_cannot_be_opened_is_said(tmp_path):
    (tmp_path / "c").write_text("")
    with (
        pytest.raises(UserError, match=r"c/d cannot be used \(.*Not a directory.*\): see to that"),
        checkpoint.open_manager(tmp_path / "c/d"),
    ):
        pass


def test_an_error_without_a_message_is_damage_too(tmp_path, start):
    def broken(record):
        raise LookupError

    folder = saved(tmp_path / "c", start, [None])
    with (
        checkpoint.open_manager(folder, read_only=True) as manager,
        pytest.warns(UserWarning, match="LookupError"),
        pytest.raises(UserError, match="can be read"),
    ):
        checkpoint.restore(manager, broken)


def test_where_none_is_sound_the_error_says_which_there_are(tmp_path, start):
    folder = saved(tmp_path / "c", start, [None, None])
    for step in ("1", "2"):
        flip_a_byte(folder / step)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(UserError, match=r"no checkpoint in .* can be read \(steps \[2, 1\]\)"),
    ):
        restore(folder, start)


def test_moments_in_bfloat16_come_back(tmp_path):
    tx = optax.adam(1e-3, mu_dtype=jnp.bfloat16)
    start = random_state(models.create("larger"), tx)
    folder = saved(tmp_path / "c", start, [None])
    state, _ = restore(folder, start)
    assert_equal(state, at(start, 1))


def test_a_checkpoint_whose_folder_cannot_be_asked_about_is_kept(tmp_path, start, monkeypatch):
    folder = saved(tmp_path / "c", start, [None])

    def failing(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with checkpoint.open_manager(folder, read_only=True) as manager:
        monkeypatch.setattr(manager, "restore", failing)
        # What `Path.exists` makes of that from Python 3.14 on.
        monkeypatch.setattr("pathlib.Path.exists", lambda _: False)
        monkeypatch.setattr("pathlib.Path.stat", failing)
        with pytest.raises((UserError, OSError), match="Input/output error"):
            checkpoint.restore(manager, lambda record: start)


def test_a_folder_that_cannot_be_written_is_said_before_orbax_finds_out(
    tmp_path, start, monkeypatch
):
    folder = saved(tmp_path / "c", start, [None])
    # Not chmod, as root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", None)
    with (
        checkpoint.open_manager(folder) as manager,
        pytest.raises(UserError, match=r"cannot be written to .*c .*not a writable folder.: see"),
    ):
        checkpoint.save(manager, at(start, 2), {"note": 2})


def test_what_went_wrong_first_is_what_is_said(tmp_path, start, monkeypatch):
    def fail(*args):
        raise PermissionError(13, "Permission denied")

    folder = saved(tmp_path / "c", start, [None])
    monkeypatch.setattr(files, "sync", fail)
    with (
        pytest.raises(UserError, match="checkpoint 1 cannot be read"),
        checkpoint.open_manager(folder),
    ):
        raise UserError("checkpoint 1 cannot be read")
    message = r"cannot be written to .*Permission denied\): see to that and start again"
    with pytest.raises(UserError, match=message), checkpoint.open_manager(folder):
        pass
