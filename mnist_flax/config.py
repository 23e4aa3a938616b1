"""Every configuration key with its default, and the checks that refuse a bad value.

A recipe in `configs/` names its network, optimiser, batch size and epochs, and what else differs
from `default()`. Every key can be overridden on the command line:
`--config.batch_size=100 --config.data.train_split=train[5000:]`.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mnist_flax import datasets, loaders, models, optim
from mnist_flax.errors import UserError, unknown

COMPUTE_DTYPES = ("float32", "bfloat16")


def default() -> ConfigDict:
    """The complete configuration; no key exists that is not here."""
    return ConfigDict(
        {
            # What the run is called; a recipe file sets its own name.
            "name": "custom",
            # A network of `models.names()`.
            "model": "larger",
            # An optimiser of `optim.OPTIMIZERS`, with Keras's numbers.
            "optimizer": "adam",
            # The highest learning rate of the schedule.
            "learning_rate": 1e-3,
            # How the learning rate changes over the run: one of `optim.SCHEDULES`.
            "schedule": "constant",
            # Examples a step; the last batch of an epoch may be shorter.
            "batch_size": 200,
            # Passes over the training split.
            "epochs": 10,
            # Determines initial weights, order of examples and dropout.
            "seed": 0,
            # Networks trained at once, with the seeds `seed`, `seed` + 1, ...: each as a run of
            # its own. One that diverges stops all.
            "num_seeds": 1,
            # dtype of the forward and backward computation; parameters stay float32. JAX
            # multiplies float32 in TF32 on newer GPUs, and in bfloat16 on TPU, unless
            # JAX_DEFAULT_MATMUL_PRECISION=highest is set.
            "compute_dtype": "float32",
            # Number of devices: the seeds are dealt out to them first, then each batch is split.
            # 0 chooses one GPU or TPU, and on CPU the most cores among which seeds divide evenly
            # and of which each gets at least 16 examples of a batch; on a tie what splits batches
            # least.
            "parallel": 0,
            "data": {
                # "digits" (embedded), "mnist", "fashion_mnist", "kmnist" or another TFDS name.
                "name": "mnist",
                # TFDS slices. The watched split is scored after each epoch; "" watches none.
                "train_split": "train",
                "watch_split": "test",
                "test_split": "test",
                # Folder with the four official .gz files; "" takes MNIST_FLAX_MANUAL_DIR, or else
                # downloads them.
                "manual_dir": "",
                # "resident": all on the device at once; "stream": decoded while training.
                "loader": "resident",
            },
            "checkpoint": {
                # Steps of an epoch between checkpoints, beside the one at its end; 0 for none.
                "every_steps": 0,
            },
        }
    )


def recipe(name: str, dataset: str, **overrides: Any) -> ConfigDict:
    """The defaults for a data set, with overrides given as `data__train_split="train[90%:]"`.

    The embedded digits are a fortieth of MNIST: `digits` takes batches of at most 32 and at
    least 20 epochs, so that the network sees enough steps to learn.
    """
    config = default()
    config.name = name if dataset == "mnist" else f"{name}-{re.sub('[/:]', '-', dataset)}"
    config.data.name = dataset
    flat = {key.replace("__", "."): value for key, value in overrides.items()}
    for key in flat:
        check_key(key)
    config.update_from_flattened_dict(flat)
    if dataset == "digits":
        config.batch_size = min(config.batch_size, 32)
        config.epochs = max(config.epochs, 20)
    return config


def check_key(key: str) -> None:
    """Raises UserError unless `key`, dotted, is a key of the configuration."""
    known = flatten(default())
    if key not in known:
        raise unknown("configuration key", key, known)


def validate(config: ConfigDict) -> None:
    """Refuses a configuration that cannot be run, before any data is loaded.

    Raises:
        UserError: one sentence naming the key, what is wrong and the nearest valid choice.
    """
    known, given = flatten(default()), flatten(config)
    for key in given:
        check_key(key)
    for key, example in known.items():
        if key not in given:
            raise UserError(
                f"the configuration key {key!r} is missing: start from config.default()"
            )
        _check_type(key, given[key], example)

    for key in ("batch_size", "epochs", "num_seeds"):
        if given[key] < 1:
            raise UserError(f"{key}={given[key]} must be at least 1")
    for key in ("seed", "parallel", "checkpoint.every_steps"):
        if given[key] < 0:
            raise UserError(f"{key}={given[key]} must be 0 or more")
    if (last := given["seed"] + given["num_seeds"] - 1) >= 2**32:
        raise UserError(f"the seed {last} must be below 2**32 = {2**32}")
    # In float32 a tiny number becomes 0, and a huge one infinite.
    with np.errstate(over="ignore"):
        rate = np.float32(given["learning_rate"])
    if not (0 < rate < math.inf):
        raise UserError(
            f"learning_rate={given['learning_rate']} must be a number above 0 in float32"
        )
    for key, choices in (
        ("model", models.names()),
        ("optimizer", optim.OPTIMIZERS),
        ("schedule", optim.SCHEDULES),
        ("compute_dtype", COMPUTE_DTYPES),
        ("data.loader", loaders.NAMES),
    ):
        if given[key] not in choices:
            raise unknown(key, given[key], choices)
    _check("data.name", given["data.name"], datasets.check_name)
    for key in ("data.train_split", "data.test_split", "data.watch_split"):
        if given[key] or key != "data.watch_split":
            _check(key, given[key], partial(datasets.check_split, given["data.name"]))


def seeds(config: ConfigDict) -> range:
    """The seeds that a run trains with."""
    return range(config.seed, config.seed + config.num_seeds)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted keys and their values, in order."""
    return flatten_dict(config.to_dict(), sep=".")


def wrong_type(key: str, value: Any) -> UserError:
    """The error for a value of another type than the key's default."""
    example = flatten(default())[key]
    kind = {int: "a whole number", float: "a number", str: "text"}[type(example)]
    return UserError(f"{key}={value!r} must be {kind}, as in {key}={example!r}")


def _check(key: str, value: Any, check: Callable[[Any], None]) -> None:
    try:
        check(value)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _check_type(key: str, value: Any, example: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = number if isinstance(example, float) else type(value) is type(example)
    if not fits:
        raise wrong_type(key, value)
