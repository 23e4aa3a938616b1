"""A trained network, read back from its run folder."""

import os
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mnist_flax import (
    checkpoint,
    datasets,
    files,
    loaders,
    optim,
    parallel,
    parts,
    rundir,
    scoring,
    steps,
)
from mnist_flax import config as config_lib
from mnist_flax import state as state_lib
from mnist_flax.errors import UserError


class Trained:
    """A network with its trained parameters.

    Attributes:
        config: the run's configuration.
        model: the Linen module.
        variables: {"params": ..., "batch_stats": ...}, as `model.apply` takes.
        step: updates made when the checkpoint was written.
        image_shape: (H, W, C) of the images it was trained on.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: nn.Module,
        variables: dict[str, Any],
        step: int,
        image_shape: tuple[int, int, int],
    ):
        self.config = config
        self.model = model
        self.variables = variables
        self.step = step
        self.image_shape = image_shape
        self._probabilities = jax.jit(
            lambda variables, images: nn.softmax(model.apply(variables, images))
        )

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities.

        Args:
            images: [B, H, W, C], or [B, H, W] where C is 1; uint8, or float in [0, 1].

        Returns:
            float32 [B, classes]; each row sums to 1.

        Raises:
            UserError: images of another shape, dtype or range.
        """
        images = self._checked(np.asarray(images))
        size = scoring.batch_size(self.image_shape)
        rows = [
            self._predict_batch(images[start : start + size])
            for start in range(0, len(images), size)
        ]
        return np.concatenate(rows) if rows else np.zeros((0, self.model.num_classes), np.float32)

    def evaluate(self, split: str | None = None) -> dict[str, Any]:
        """Scores a TFDS slice of the run's data set, by default its test split.

        Returns:
            {"loss": mean cross-entropy, "accuracy": in [0, 1], "count": examples scored}.

        Raises:
            UserError: there is no such split, the data set cannot be had, or its images or
                classes are not those of the network.
        """
        data = self.config.data
        split = data.test_split if split is None else split
        mesh = parallel.single_mesh()
        loader = loaders.create(data.loader, data.name, split, data.manual_dir, mesh)
        given = (loader.image_shape, datasets.num_classes(data.name))
        taken = (self.image_shape, self.model.num_classes)
        if given != taken:
            (there, classes_there), (here, classes_here) = given, taken
            raise UserError(
                f"{data.name} has images of {'×'.join(map(str, there))} pixels in {classes_there} "
                f"classes, and the network takes {'×'.join(map(str, here))} in {classes_here}: "
                "score it on a data set of its own kind"
            )
        return scoring.compile_scorer(self.model, self.variables, loader, mesh)(self.variables)

    def _checked(self, images: np.ndarray) -> np.ndarray:
        shape = self.image_shape
        given = images.shape
        if images.ndim == 3 and shape[2] == 1:
            images = images[..., None]
        if images.ndim != 4 or images.shape[1:] != shape:
            raise UserError(
                f"images of shape {given} do not fit this network: give "
                f"[B, {', '.join(map(str, shape))}]"
            )
        if images.dtype == np.uint8:
            return images
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"images are {images.dtype}: give uint8, or float in [0, 1]")
        # With a tolerance, as resizing rounds.
        if images.size and not (images.min() >= -1e-6 and images.max() <= 1 + 1e-6):
            raise UserError(
                f"float images reach from {images.min():g} to {images.max():g}: scale them to "
                "[0, 1], or give uint8"
            )
        return images.astype(np.float32)

    def _predict_batch(self, images: np.ndarray) -> np.ndarray:
        # Filled up to a power of two, so that few sizes are compiled.
        size = 1 << (len(images) - 1).bit_length()
        filled = np.zeros((size, *images.shape[1:]), images.dtype)
        filled[: len(images)] = images
        if filled.dtype == np.uint8:
            filled = steps.scale(filled)
        return np.asarray(self._probabilities(self.variables, filled))[: len(images)]


def load(workdir: str | os.PathLike, step: int | None = None, seed: int | None = None) -> Trained:
    """Reads a finished or unfinished run.

    Called before JAX's first computation it limits XLA's threads to the cores that a container may
    use (`parallel.limit_threads`).

    Args:
        workdir: the run folder.
        step: the checkpoint's step; without it the newest sound one.
        seed: which network of a run with several seeds; not needed where there is one.

    Raises:
        UserError: the folder is no run, has no checkpoint that can be read, not that step or not
            that seed, or leaves open which seed; JAX has no device.
    """
    run_dir = files.local(workdir)
    config = rundir.read_config(run_dir)
    parallel.limit_threads()
    # For its UserError: without a device Orbax would fail later, with a traceback.
    parallel.devices()
    seeds = config_lib.seeds(config)
    if seed is None and len(seeds) > 1:
        raise UserError(
            f"the run in {run_dir} has the seeds {seeds[0]} to {seeds[-1]}: say which, such as "
            f"--seed={seeds[0]}, or seed={seeds[0]} in Python"
        )
    if seed is not None and seed not in seeds:
        raise UserError(
            f"the run in {run_dir} has no seed {seed}: its seeds are {', '.join(map(str, seeds))}"
        )
    no_checkpoint = (
        f"the run in {run_dir} has no checkpoint: let it finish an epoch, or put back those it had"
    )
    folder = rundir.checkpoints(run_dir)
    if not folder.is_dir():
        raise UserError(no_checkpoint)

    def abstract(record: dict[str, Any]) -> state_lib.TrainState:
        shape = tuple(record["image_shape"])
        rundir.check_trained(run_dir, record, config)
        model = parts.create_model(config, record["num_classes"])
        # Not the run's where a network from a Keras file is about to train with another.
        tx = optim.without_schedule(record["config"]["optimizer"])
        create = partial(state_lib.create, model=model, tx=tx, image_shape=shape)
        if len(seeds) > 1:
            return jax.eval_shape(jax.vmap(create), np.zeros(len(seeds), np.uint32))
        return jax.eval_shape(create, np.uint32(0))

    with checkpoint.open_manager(folder, read_only=True) as manager:
        restored = checkpoint.restore(manager, abstract, step)
    if restored is None:
        raise UserError(no_checkpoint)
    state, record = restored
    if len(seeds) > 1:
        state = jax.tree.map(lambda leaf: leaf[seeds.index(seed)], state)
    model = parts.create_model(config, record["num_classes"])
    variables, made = state_lib.variables(state), state_lib.num_updates(state)
    return Trained(config, model, variables, made, tuple(record["image_shape"]))
