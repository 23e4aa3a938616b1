"""A run folder: config.json, metrics.jsonl, summary.json, checkpoints/ and a lock, .lock."""

import fcntl
import json
import math
import os
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mnist_flax import config as config_lib
from mnist_flax import files
from mnist_flax.errors import UserError

_LOCK = ".lock"

# What is shown of a finished run.
_SHOWN = ("test_loss", "test_accuracy", "test_examples")
_SHOWN_OF_SEVERAL = ("test_accuracy_deviation", "test_accuracy_min", "test_accuracy_max")

# Where the data lies may change between two starts of the same run.
_MAY_DIFFER = ("data.manual_dir",)

# What the parameters in a checkpoint depend on.
_OF_THE_NETWORK = ("model", "num_seeds")


def checkpoints(run_dir: Path) -> Path:
    """The folder of the checkpoints."""
    return run_dir / "checkpoints"


def nearest_existing(run_dir: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())


def check(run_dir: Path, config: ConfigDict) -> None:
    """Refuses a folder in which a run of this configuration cannot start or resume.

    Changes nothing.

    Raises:
        UserError: a file, a folder that cannot be written, one that holds something else, or a
            run of another configuration that has trained.
    """
    try:
        _check(run_dir, config)
    except OSError as error:
        raise UserError(
            f"the run folder {run_dir} cannot be used ({error.strerror}): "
            "name another with --workdir"
        ) from None


def _check(run_dir: Path, config: ConfigDict) -> None:
    if run_dir.is_symlink() and not run_dir.exists():
        raise UserError(f"the run folder {run_dir} is a link to nowhere: name another")
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"the run folder {run_dir} is a file: name another with --workdir")
    existing = nearest_existing(run_dir)
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    # A finished run is only shown.
    finished = files.exists(run_dir / "summary.json")
    if not writable and not finished:
        raise UserError(
            f"the run folder {run_dir} cannot be written, as {existing} is not a writable "
            "folder: name another with --workdir"
        )
    if not files.exists(run_dir):
        return
    folder = checkpoints(run_dir)
    if not finished and os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is no folder, or on a disk that is not there: see to that first")
    # A start that was killed may leave its lock, a file half-written under another name, and no
    # checkpoint yet.
    left = {path.name for path in run_dir.iterdir() if path.suffix != ".tmp"}
    if left <= {_LOCK, folder.name} and not _names(folder):
        return
    if not files.exists(run_dir / "config.json"):
        raise UserError(
            f"the run folder {run_dir} holds something other than a run (there is no "
            "config.json in it): name an empty or a new one with --workdir"
        )
    stored, given = (config_lib.flatten(c) for c in (read_config(run_dir), config))
    # Not what Orbax left of a save that was cut short.
    steps = {name for name in _names(folder) if name.isdigit()}
    metrics = run_dir / "metrics.jsonl"
    rows = metrics.read_bytes().count(b"\n") if files.exists(metrics) else 0
    # A save goes on while the next epoch trains, and the next save waits for it: once there is a
    # third row, the first checkpoint was complete.
    if not steps and not finished and rows > 2:
        raise UserError(
            f"the checkpoints of the run in {run_dir}, which has trained {rows} epochs, are gone: "
            "put them back, or name another folder with --workdir"
        )
    if finished or steps - {"0"}:
        fixed = (stored | given).keys() - _MAY_DIFFER
    else:
        # Nothing was trained that could be lost; step 0 is a network from elsewhere.
        fixed = _OF_THE_NETWORK if steps else ()
    if differing := _differing(stored, given, fixed):
        raise UserError(
            f"the run folder {run_dir} holds a run of another configuration ({differing}): use the "
            "same, or name another folder with --workdir"
        )


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if files.exists(folder) else []


def check_trained(run_dir: Path, record: dict[str, Any], config: ConfigDict) -> None:
    """Refuses another configuration than that of a checkpoint, by its record, if it has trained.

    Raises:
        UserError: config.json is not that of the checkpoints.
    """
    at = record["position"]
    if not (at["epoch"] or np.any(at["count"])):
        return
    stored = config_lib.flatten(ConfigDict(record["config"]))
    given = config_lib.flatten(config)
    # What other versions know is the rest.
    fixed = stored.keys() & given.keys() - set(_MAY_DIFFER)
    if differing := _differing(stored, given, fixed):
        raise UserError(
            f"the checkpoints in {run_dir} are of another configuration than its config.json "
            f"({differing}): restore that file from a copy"
        )


def _differing(stored: dict, given: dict, fixed: Collection[str]) -> str:
    return "; ".join(
        f"{key} is {stored.get(key)!r} there and {given.get(key)!r} now"
        for key in stored | given
        if key in fixed and stored.get(key) != given.get(key)
    )


@contextmanager
def locked(run_dir: Path, config: ConfigDict) -> Iterator[None]:
    """Makes the folder for one process to train in, and keeps others from it meanwhile.

    Raises:
        UserError: another process trains there, or left something since `check`; the folder cannot
            be written.
    """
    with _as_user_error(run_dir):
        made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in made:
            files.sync_names(path.parent)
        lock = (run_dir / _LOCK).open("w")
    # The system unlocks what is closed, also when the process is killed.
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in the run folder {run_dir}: wait for it, or name "
                "another folder with --workdir"
            ) from None
        except OSError as error:
            warnings.warn(
                f"the run folder {run_dir} cannot be locked ({error.strerror}): start no second "
                "run in it while this one trains",
                stacklevel=3,
            )
        # The file stays: one that was unlinked could be locked twice.
        check(run_dir, config)
        yield


@contextmanager
def _as_user_error(run_dir: Path) -> Iterator[None]:
    """Raises UserError where the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the run folder {run_dir} cannot be written ({error.strerror}): "
            f"{files.remedy(error.strerror)} and start again, or name another"
        ) from None


def write_config(run_dir: Path, config: ConfigDict) -> None:
    """Writes config.json, all of it or nothing.

    Raises:
        UserError: it cannot be written.
    """
    write_json(run_dir / "config.json", config.to_dict())


def read_config(run_dir: Path) -> ConfigDict:
    """The configuration of a run.

    Raises:
        UserError: the folder is not there, is no run, or its configuration is damaged.
    """
    path = run_dir / "config.json"
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        what = "is not a run folder (there is no config.json in it)"
        raise UserError(
            f"{run_dir} {what if run_dir.exists() else 'does not exist'}: "
            "give the folder that a training run printed"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another folder") from error
    try:
        config = config_lib.default()
        stored = json.loads(text)
        with config.unlocked():
            config.update(stored)
        for key in config_lib.flatten(config):
            config_lib.check_key(key)
        if "model" not in stored:
            raise ValueError("it names no model")
        return config
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged, of another version or no run's ({error}): give another folder"
        ) from error


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None where the run is not finished.

    Raises:
        UserError: it is damaged or cannot be read.
    """
    path = run_dir / "summary.json"
    try:
        if not files.exists(path):
            return None
        summary = json.loads(path.read_text())
        seeds = summary.get("seeds", [])
        _check_numbers(summary, _SHOWN + _SHOWN_OF_SEVERAL if seeds else _SHOWN)
        for each in seeds:
            _check_numbers(each, ("seed", "test_accuracy"))
        return summary
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it to score the run again") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): delete it to score the run again"
        ) from error


def _check_numbers(record: dict[str, Any], keys: Iterable[str]) -> None:
    """Raises ValueError unless the record has a finite number under each key."""
    for key in keys:
        number = record.get(key)
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"its {key} is {number}")


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Marks the run as finished.

    Raises:
        UserError: it cannot be written.
    """
    write_json(run_dir / "summary.json", summary)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes all of a file or nothing.

    Raises:
        UserError: it cannot be written.
    """
    _replace(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def start_metrics(run_dir: Path, step: int) -> None:
    """Leaves in metrics.jsonl what was written up to `step`, where a resumed run goes on.

    Raises:
        UserError: it is damaged, or cannot be read or written.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True) if files.exists(path) else []
        # Only a line that ends was written whole.
        whole = [line for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): move it away") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): see to that first") from error
    kept = []
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
            # The summary adds up the seconds, when all is trained.
            _check_numbers(row, ("step", "seconds"))
            if row["seconds"] <= 0:
                raise ValueError(f"its seconds are {row['seconds']}")
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"line {number} of {path} is damaged ({error}): mend or delete it"
            ) from None
        if row["step"] <= step:
            kept.append(line)
    _replace(path, "".join(kept))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, one an epoch."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def append_metrics(run_dir: Path, row: dict[str, Any]) -> None:
    """Adds one JSON object as a line to metrics.jsonl.

    Raises:
        UserError: it cannot be written.
    """
    with _as_user_error(run_dir), (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    with _as_user_error(path.parent):
        files.replace_text(path, text)
