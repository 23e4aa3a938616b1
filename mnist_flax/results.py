"""What a run leaves in metrics.jsonl and summary.json."""

import statistics
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mnist_flax import config as config_lib
from mnist_flax import environment, steps
from mnist_flax.position import Position


def epoch_row(
    config: ConfigDict, position: Position, step: int, watch: dict[str, Any]
) -> dict[str, Any]:
    """The row of a finished epoch in metrics.jsonl.

    Args:
        config: the run's.
        position: at the end of the epoch.
        step: the number of updates made.
        watch: the score of the watched split, as `scoring` gives it; empty where there is none.
    """
    train = steps.averages(position)
    scores = {
        "train_loss": train["loss"],
        "train_accuracy": train["accuracy"],
        "watch_loss": watch.get("loss"),
        "watch_accuracy": watch.get("accuracy"),
    }
    return {
        "epoch": position.epoch + 1,
        "step": step,
        **_over_seeds(config, scores),
        "images_per_second": float(np.sum(position.count)) / position.seconds,
        "seconds": position.seconds,
    }


def summary(
    config: ConfigDict,
    train_examples: int,
    parameters: int,
    score: dict[str, Any],
    position: Position,
    rows: list[dict[str, Any]],
    devices: int,
) -> dict[str, Any]:
    """The contents of summary.json.

    Args:
        config: the run's.
        train_examples, parameters: how many there are, the latter of one network.
        score: of the test split, as `scoring` gives it.
        position: at the end of the run.
        rows: of metrics.jsonl.
        devices: the number of those that trained.
    """
    images = train_examples * config.num_seeds
    seconds = sum(row["seconds"] for row in rows)
    found = {
        "config_name": config.name,
        "dataset": config.data.name,
        "model": config.model,
        "parameters": parameters,
        "train_examples": train_examples,
        "test_examples": score["count"],
        "epochs": config.epochs,
        "seed": config.seed,
        **_over_seeds(config, {f"test_{key}": score[key] for key in ("loss", "accuracy")}),
        "wall_seconds": position.wall_seconds,
        "compile_seconds": position.compile_seconds,
        # None where the lines of all epochs were deleted.
        "images_per_second": len(rows) * images / seconds if rows else None,
        "device": environment.device_name(devices),
        "versions": environment.versions(),
    }
    if config.num_seeds > 1:
        found |= {
            "test_accuracy_deviation": statistics.stdev(score["accuracy"]),
            "test_accuracy_min": min(score["accuracy"]),
            "test_accuracy_max": max(score["accuracy"]),
        }
    return found


def _over_seeds(config: ConfigDict, scores: dict[str, Any]) -> dict[str, Any]:
    """The scores; of several seeds their means, and under "seeds" each seed's own."""
    if config.num_seeds == 1:
        return scores
    # None is what was not scored.
    means = {key: None if v is None else statistics.fmean(v) for key, v in scores.items()}
    each = [
        {"seed": seed} | {key: None if v is None else v[i] for key, v in scores.items()}
        for i, seed in enumerate(config_lib.seeds(config))
    ]
    return means | {"seeds": each}
