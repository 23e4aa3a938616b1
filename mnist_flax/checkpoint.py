"""Checkpoints of a run; the only module that imports Orbax.

A checkpoint holds the train state and a JSON record: where the run stood, its configuration and
the versions that wrote it. The two latest are kept, and the best where a metric is given.
"""

import json
import logging
import os
import secrets
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mnist_flax import files, parallel
from mnist_flax.errors import UserError
from mnist_flax.state import TrainState, num_bytes, num_updates

Manager = ocp.CheckpointManager

_METRIC = "watch_accuracy"
# What a checkpoint takes beside its numbers, at most.
_BESIDE_BYTES = 2**20

# Orbax warns of what is meant here, a checkpoint without metrics, a folder opened to read, and logs
# each error that it raises, with the traceback of every thread.
_ORBAX = os.path.dirname(ocp.__file__)
logging.getLogger("absl").addFilter(lambda record: not record.pathname.startswith(_ORBAX))


@contextmanager
def open_manager(folder: Path, *, read_only: bool = False) -> Iterator[Manager]:
    """An asynchronous manager of `folder`, closed on every way out.

    Closing waits for a save under way, so that none is lost.

    Raises:
        UserError: the last save could not be written, or a metric of one before cannot be read.
    """
    policies = [
        preservation_policy.LatestN(2),
        preservation_policy.BestN(
            get_metric_fn=itemgetter(_METRIC),
            n=1,
            keep_checkpoints_without_metrics=False,
        ),
    ]
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"{process}"
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        best_fn=itemgetter(_METRIC),
        read_only=read_only,
        # Without the metrics, which are of no use then.
        lightweight_initialize=read_only,
        create=not read_only,
        # What a save left that was cut short.
        cleanup_tmp_directories=not read_only,
        # One process may read while the others do not.
        multiprocessing_options=alone if read_only else ocp.options.MultiprocessingOptions(),
    )
    try:
        if not read_only:
            _leave_out_damaged_metrics(folder)
        manager = Manager(folder.absolute(), options=options)
    except OSError as error:
        raise UserError(f"{folder} cannot be used ({_reason(error)}): see to that first") from error
    try:
        yield manager
    except BaseException:
        # What went wrong first is what is said.
        with suppress(UserError):
            _close(manager, folder, read_only)
        raise
    _close(manager, folder, read_only)


def _close(manager: Manager, folder: Path, read_only: bool) -> None:
    with _as_user_error(folder):
        try:
            if not read_only:
                _sync_latest(manager)
        finally:
            manager.close()


def _leave_out_damaged_metrics(folder: Path) -> None:
    """Orbax reads those of all checkpoints when it opens a folder, and fails at a damaged one.

    Raises:
        UserError: one cannot be read, which may pass.
    """
    for path in folder.glob("*/metrics/metrics"):
        try:
            float(json.loads(path.read_bytes())[_METRIC])
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): see to that first"
            ) from error
        except (ValueError, LookupError, TypeError):
            path.unlink()
            step = path.parents[1].name
            warnings.warn(
                f"the accuracy in checkpoint {step} is damaged, so that it no longer counts as "
                "the best",
                stacklevel=4,
            )


@contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    """Raises UserError where Orbax could not write."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"a checkpoint cannot be written to {folder} ({_reason(error)}): "
            f"{files.remedy(str(error))} and start again"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def check_room(folder: os.PathLike, state: TrainState) -> None:
    """Refuses a folder in which a state, which may be abstract, cannot be saved.

    Orbax finds out in many threads at once, and those that wait for others wait five minutes.

    Raises:
        UserError: its disk has no room, or the folder cannot be written.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"a checkpoint cannot be written to {folder} (it is not a writable folder): see to "
            "that and start again"
        )
    needed = num_bytes(state) + _BESIDE_BYTES
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"a checkpoint takes {needed / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free on "
            f"the disk of {folder}: make room there and start again"
        )


def save(
    manager: Manager,
    state: TrainState,
    record: dict[str, Any],
    watch_accuracy: float | None = None,
) -> None:
    """Starts saving the state under its step; the state may be donated once this returns.

    The checkpoint before is on the disk then, whatever happens to the machine: Orbax deletes an
    older one when this one is complete.

    Raises:
        UserError: there is no room for it, or the save before could not be written.
    """
    step = num_updates(state)
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(jax.tree.map(_one_copy, state)),
        record=ocp.args.JsonSave({"run": record, "crc32": _crc32(state)}),
    )
    metrics = None if watch_accuracy is None else {_METRIC: watch_accuracy}
    with _as_user_error(manager.directory):
        check_room(manager.directory, state)
        _sync_latest(manager)
        manager.save(step, args=args, metrics=metrics, force=True)


def _sync_latest(manager: Manager) -> None:
    """Waits for a save under way and has it outlast a power cut, which Orbax does not."""
    manager.wait_until_finished()
    if (step := manager.latest_step()) is not None:
        files.sync(Path(manager.directory) / str(step))
        # Where Orbax gave it its name.
        files.sync_names(Path(manager.directory))


def put_aside(manager: Manager, step: int) -> None:
    """Renames the checkpoints after `step`, which `restore` passed over, to STEP.damaged-...

    The manager would keep them instead of sound ones. What is damaged for one program may be
    mended.
    """
    passed_over = [found for found in manager.all_steps() if found > step]
    for found in passed_over:
        path = Path(manager.directory) / str(found)
        path.rename(path.with_name(f"{found}.damaged-{secrets.token_hex(4)}"))
    if passed_over:
        manager.reload()


def restore(
    manager: Manager,
    abstract_state_of: Callable[[dict[str, Any]], TrainState],
    step: int | None = None,
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest sound checkpoint, or that of `step`; None where there is none at all.

    A damaged one is passed over with a warning. One that only cannot be read now, for want of
    memory or permission or as the disk fails, is an error.

    Args:
        manager: of `open_manager`.
        abstract_state_of: gives for a checkpoint's record a state with the shapes, dtypes and
            shardings to restore; what has no sharding is restored on the first device. It may raise
            UserError to refuse the checkpoint.
        step: the only checkpoint to consider.

    Returns:
        The state and its record.

    Raises:
        UserError: no checkpoint can be read, or the one asked for cannot or does not exist.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if step is not None and step not in steps:
        raise UserError(f"{manager.directory} has no checkpoint of step {step}: it has {steps}")
    if not steps:
        return None
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for candidate in steps if step is None else [step]:
        try:
            args = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = manager.restore(candidate, args=args).record
            abstract = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device
                ),
                abstract_state_of(record["run"]),
            )
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            state = manager.restore(candidate, args=args).state
            if record["crc32"] != _crc32(state):
                raise ValueError("the checksum of its numbers is wrong")
        except UserError:
            raise
        except Exception as error:
            # Orbax raises whatever the damage leads to.
            if not files.exists(Path(manager.directory) / str(candidate)):
                # The run is under way, and has newer ones by now.
                manager.reload()
                return restore(manager, abstract_state_of, step)
            if _may_pass(error):
                raise UserError(
                    f"checkpoint {candidate} in {manager.directory} cannot be read at the moment "
                    f"({_reason(error)}): see to that, or move it away, and start again"
                ) from error
            if step is not None:
                raise UserError(
                    f"checkpoint {step} in {manager.directory} is damaged ({_reason(error)}): "
                    f"take another of {steps}"
                ) from error
            warnings.warn(
                f"checkpoint {candidate} is damaged and passed over: {_reason(error)}", stacklevel=2
            )
            continue
        return state, record["run"]
    raise UserError(
        f"no checkpoint in {manager.directory} can be read (steps {steps}): "
        "restore the folder from a copy or start again in another run folder"
    )


def _may_pass(error: Exception) -> bool:
    """Whether a checkpoint that cannot be read may be sound nevertheless."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    # Orbax's library for arrays gives the system's errors as texts.
    statuses = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "ABORTED")
    statuses += ("DEADLINE_EXCEEDED", "Input/output error", "Stale file handle")
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        return True
    return any(status in str(error) for status in statuses)


def _one_copy(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """One copy of what several devices have: of all, Orbax has each write a part, and compiles a
    slice for each.
    """
    if not isinstance(leaf, jax.Array):
        return leaf
    if leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    # Seeds, dealt out to groups of devices.
    owned = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    mesh = Mesh([shard.device for shard in owned], (parallel.SEEDS,))
    return jax.make_array_from_single_device_arrays(
        leaf.shape, parallel.seeds_sharding(mesh), [shard.data for shard in owned]
    )


def _crc32(state: TrainState) -> int:
    """CRC-32 of the bytes of all arrays, as Orbax would restore a flipped byte without an error."""
    crc = 0
    for leaf in jax.tree.leaves(state):
        crc = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), crc)
    return crc
