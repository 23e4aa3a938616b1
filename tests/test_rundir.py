import errno
import fcntl
import json
import os
import secrets
from functools import partial
from pathlib import Path

import pytest

from mnist_flax import config as config_lib
from mnist_flax import datasets, files, rundir, train, trained
from mnist_flax.errors import UserError


def test_a_new_and_an_empty_folder_will_do(tmp_path):
    rundir.check(tmp_path / "a/b", config_lib.default())
    rundir.check(tmp_path, config_lib.default())
    assert not list(tmp_path.iterdir())


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="run is a file"):
        rundir.check(tmp_path / "run", config_lib.default())
    with pytest.raises(UserError, match="is not a writable folder"):
        rundir.check(tmp_path / "run/inside", config_lib.default())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    # Not chmod, as root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="is not a writable folder: name another with --workdir"):
        rundir.check(tmp_path / "run", config_lib.default())


def test_a_finished_run_of_somebody_else_is_good_to_look_at(tmp_path, monkeypatch):
    rundir.write_config(tmp_path, config_lib.default())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="is not a writable folder"):
        rundir.check(tmp_path, config_lib.default())
    rundir.write_summary(tmp_path, {})
    rundir.check(tmp_path, config_lib.default())


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds something other than a run"):
        rundir.check(tmp_path, config_lib.default())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_of_another_configuration_is_refused_with_the_differing_keys(tmp_path):
    config = config_lib.default()
    rundir.write_config(tmp_path, config)
    (rundir.checkpoints(tmp_path) / "300").mkdir(parents=True)
    rundir.check(tmp_path, config)
    config.batch_size = 32
    config.data.train_split = "train[5000:]"
    with pytest.raises(UserError) as error:
        rundir.check(tmp_path, config)
    message = str(error.value)
    assert "batch_size is 200 there and 32 now" in message
    assert "data.train_split is 'train' there and 'train[5000:]' now" in message
    assert "epochs" not in message


def test_a_run_without_a_checkpoint_gives_way_to_another_configuration(tmp_path):
    config = config_lib.default()
    rundir.write_config(tmp_path, config)
    rundir.checkpoints(tmp_path).mkdir()
    config.batch_size = 32
    with rundir.locked(tmp_path, config):
        # It may still be refused, for its data.
        assert rundir.read_config(tmp_path).batch_size == 200
        rundir.write_config(tmp_path, config)
    (rundir.checkpoints(tmp_path) / "47.orbax-checkpoint-tmp").mkdir()
    config.batch_size = 64
    rundir.check(tmp_path, config)
    rundir.write_summary(tmp_path, {})
    with pytest.raises(UserError, match="batch_size is 32 there and 64 now"):
        rundir.check(tmp_path, config)


def test_an_imported_network_trains_on_as_configured(tmp_path):
    config = config_lib.default()
    rundir.write_config(tmp_path, config)
    (rundir.checkpoints(tmp_path) / "0").mkdir(parents=True)
    config.batch_size, config.seed, config.data.name = 32, 3, "digits"
    config.optimizer = "rmsprop"
    rundir.check(tmp_path, config)
    config.model = "convnet"
    with pytest.raises(UserError, match=r"\(model is 'larger' there and 'convnet' now\)"):
        rundir.check(tmp_path, config)
    config.model = "larger"
    (rundir.checkpoints(tmp_path) / "300").mkdir()
    with pytest.raises(UserError, match="batch_size is 200 there and 32 now"):
        rundir.check(tmp_path, config)


def test_where_the_data_lies_may_change(tmp_path):
    config = config_lib.default()
    rundir.write_config(tmp_path, config)
    (rundir.checkpoints(tmp_path) / "300").mkdir(parents=True)
    record = {"position": {"epoch": 1, "count": 0}, "config": config.to_dict()}
    config.data.manual_dir = "elsewhere"
    rundir.check(tmp_path, config)
    rundir.check_trained(tmp_path, record, config)
    # As an earlier version leaves it, which knew less, or a later one, which knows more.
    del record["config"]["compute_dtype"]
    record["config"]["later"] = 1
    rundir.check_trained(tmp_path, record, config)
    record["config"]["batch_size"] = 1
    message = "of another configuration than its config.json .batch_size is 1 there and 200 now"
    with pytest.raises(UserError, match=message):
        rundir.check_trained(tmp_path, record, config)
    record["position"] = {"epoch": 0, "count": 0}
    rundir.check_trained(tmp_path, record, config)


@pytest.mark.parametrize(
    "text", [b"{", b"{}", b"[]", b"\xff", b'{"bach_size": 3}', b'{"batch_size": "many"}']
)
def test_a_damaged_configuration_is_said(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match="config.json is damaged, of another version or no run's"):
        rundir.read_config(tmp_path)


def test_a_folder_with_somebody_elses_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="no run's"):
        rundir.check(tmp_path, config_lib.default())


def test_names_that_the_system_refuses_are_said(tmp_path):
    with pytest.raises(UserError, match="cannot be used"):
        rundir.check(tmp_path / ("long" * 100), config_lib.default())
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="is a link to nowhere"):
        rundir.check(tmp_path / "link", config_lib.default())


def test_checkpoints_that_are_gone_are_said(tmp_path):
    config = config_lib.default()
    rundir.write_config(tmp_path, config)
    row = {"step": 1, "seconds": 1.0}
    for _ in range(2):
        rundir.append_metrics(tmp_path, row)
    # As where the first was never finished.
    rundir.check(tmp_path, config)
    rundir.append_metrics(tmp_path, row)
    with pytest.raises(UserError, match="which has trained 3 epochs, are gone: put them back"):
        rundir.check(tmp_path, config)
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    rundir.check(tmp_path, config)


def test_a_start_that_was_killed_can_be_repeated(tmp_path):
    (tmp_path / "config.json.tmp").write_text("{")
    (tmp_path / ".lock").touch()
    rundir.checkpoints(tmp_path).mkdir()
    rundir.check(tmp_path, config_lib.default())
    with rundir.locked(tmp_path, config_lib.default()):
        pass


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    config = config_lib.default()
    with rundir.locked(tmp_path / "run", config):
        with (
            pytest.raises(UserError, match=r"another process is training in the run folder .*run"),
            rundir.locked(tmp_path / "run", config),
        ):
            pass
        # The one that was refused has not let go of it.
        with pytest.raises(UserError), rundir.locked(tmp_path / "run", config):
            pass
    with rundir.locked(tmp_path / "run", config):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_checkpoints_that_are_no_folder_are_said(tmp_path):
    rundir.write_config(tmp_path, config_lib.default())
    rundir.checkpoints(tmp_path).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="checkpoints is no folder, or on a disk that is not there"):
        rundir.check(tmp_path, config_lib.default())
    # Of a finished run nothing is asked but its summary.
    rundir.write_summary(tmp_path, {})
    rundir.check(tmp_path, config_lib.default())


def test_checkpoints_of_another_program_are_no_run(tmp_path):
    (rundir.checkpoints(tmp_path) / "epoch_3").mkdir(parents=True)
    with pytest.raises(UserError, match="holds something other than a run"):
        rundir.check(tmp_path, config_lib.default())


def test_what_another_process_began_since_the_check_is_left_alone(tmp_path):
    config = config_lib.default()
    rundir.check(tmp_path, config)
    rundir.write_config(tmp_path, config)
    (rundir.checkpoints(tmp_path) / "300").mkdir(parents=True)
    other = config_lib.default()
    other.seed = 1
    with (
        pytest.raises(UserError, match="seed is 0 there and 1 now"),
        rundir.locked(tmp_path, other),
    ):
        pass
    assert rundir.read_config(tmp_path).seed == 0


def test_the_name_of_a_new_folder_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_one", synced.append)
    for _ in range(2):
        with rundir.locked(tmp_path / "runs/one", config_lib.default()):
            assert synced == [tmp_path / "runs", tmp_path]

    def refuse(path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "sync_one", refuse)
    # Beside others' folders, which may be written and not read, and where folders have no fsync.
    for code in (errno.EACCES, errno.EINVAL):
        with rundir.locked(tmp_path / f"runs/{code}", config_lib.default()):
            pass
    code = errno.EIO
    with (
        pytest.raises(UserError, match="Input/output error"),
        rundir.locked(tmp_path / "runs/three", config_lib.default()),
    ):
        pass


def test_a_folder_that_cannot_be_locked_is_said(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    with (
        pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"),
        rundir.locked(tmp_path, config_lib.default()),
    ):
        pass


def test_files_of_somebody_else_are_said(tmp_path, monkeypatch):
    # Not chmod, as root may read everything.
    def refused(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refused)
    monkeypatch.setattr(files, "exists", lambda _: True)
    with pytest.raises(UserError, match=r"config.json cannot be read \(Permission denied\)"):
        rundir.read_config(tmp_path)
    with pytest.raises(UserError, match=r"summary.json cannot be read \(Permission denied\)"):
        rundir.read_summary(tmp_path)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read \(Permission denied\)"):
        rundir.start_metrics(tmp_path, 5)


def test_damaged_records_are_said(tmp_path):
    (tmp_path / "summary.json").write_text('{"test_')
    with pytest.raises(UserError, match=r"summary.json is damaged .* delete it to score"):
        rundir.read_summary(tmp_path)
    scores = {"test_loss": 0.1, "test_accuracy": 0.9}
    whole = scores | {"test_examples": 10}
    seeds = [{"seed": 1, "test_accuracy": 0.9}, {"seed": 2, "test_accuracy": 0.9}]
    several = whole | {f"test_accuracy_{of}": 0.9 for of in ("deviation", "min", "max")}
    for sound in (whole, several | {"seeds": seeds}):
        rundir.write_summary(tmp_path, sound)
        assert rundir.read_summary(tmp_path) == sound
    damaged = [[], 7, list(whole), scores, whole | {"seeds": seeds}, whole | {"seeds": 3}]
    damaged += [whole | {"test_loss": loss} for loss in (None, "0.1", True, float("nan"))]
    damaged += [several | {"seeds": [{"seed": 1}]}, several | {"seeds": ["one"]}]
    for other in damaged:
        (tmp_path / "summary.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=r"summary.json is damaged .* delete it to score"):
            rundir.read_summary(tmp_path)
    first = b'{"step": 1, "seconds": 1.5}\n'
    for line in (
        b'{"ste',
        b"[]",
        b'{"step": 2}',
        *(b'{"step": 2, "seconds": %b}' % seconds for seconds in (b'"x"', b"null", b"NaN", b"0")),
        b'{"step": "2", "seconds": 1.5}',
    ):
        (tmp_path / "metrics.jsonl").write_bytes(first + line + b"\n")
        with pytest.raises(UserError, match="line 2 of .*metrics.jsonl is damaged .*mend or del"):
            rundir.start_metrics(tmp_path, 5)
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="metrics.jsonl is damaged .*move it away"):
        rundir.start_metrics(tmp_path, 5)


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        rundir.read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a run folder"):
        rundir.read_config(tmp_path)


def test_metrics_go_on_where_a_resumed_run_does(tmp_path):
    rundir.start_metrics(tmp_path, 0)
    for step in (6, 12, 18):
        rundir.append_metrics(tmp_path, {"step": step, "seconds": 1.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    rundir.start_metrics(tmp_path, 12)
    assert [row["step"] for row in rundir.read_metrics(tmp_path)] == [6, 12]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_said(tmp_path, monkeypatch):
    message = "cannot be written .No space left on device.: make room there and start again"
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=message):
        rundir.append_metrics(tmp_path, {"step": 1})
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0")
    (tmp_path / ".summary.json.0.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=message):
        rundir.write_summary(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    rundir.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        rundir.write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_what_is_written_outlasts_a_power_cut(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    rundir.append_metrics(tmp_path, {"epoch": 1})
    assert synced == [str(tmp_path / "metrics.jsonl")]
    rundir.write_json(tmp_path / "summary.json", {})
    # The file under its first name, then the folder in which it got the other.
    assert Path(synced[1]).name.startswith(".summary.json.") and synced[2] == str(tmp_path)


def test_a_record_whose_disk_fails_is_not_taken_for_none(tmp_path, monkeypatch):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "seconds": 2}\n')

    def failing(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        # What `Path.exists` makes of that from Python 3.14 on.
        patched.setattr("pathlib.Path.exists", lambda _: False)
        patched.setattr("pathlib.Path.stat", failing)
        for ask in (rundir.read_summary, lambda folder: rundir.start_metrics(folder, 1)):
            with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)"):
                ask(tmp_path)
    assert rundir.read_metrics(tmp_path) == [{"step": 1, "seconds": 2}]


def test_a_url_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.local("~/run") == tmp_path / "run"
    config = config_lib.default()
    for refused in (partial(train.train_and_evaluate, config), trained.load):
        with pytest.raises(UserError, match="gs://bucket/run is a URL: name a folder"):
            refused("gs://bucket/run")
    monkeypatch.setenv("TFDS_DATA_DIR", "s3://bucket/data")
    with pytest.raises(UserError, match="s3://bucket/data is a URL: name a folder"):
        datasets.load("mnist", "test")
    assert not any(tmp_path.iterdir())
