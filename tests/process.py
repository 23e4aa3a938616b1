"""A process of several that train together: `python -m tests.process PORT COUNT INDEX`."""

import sys
import zlib
from functools import partial

import jax
import numpy as np

from mnist_flax import batches, decoding, epochs, loaders, parallel, parts, steps
from mnist_flax import config as config_lib


def train_on_two_devices(loader_name: str) -> tuple[int, float, int]:
    """The checksum of a trained state, its loss, and the number of examples read."""
    config = config_lib.default()
    config.model, config.batch_size, config.parallel = "baseline", 35, 2
    mesh = parallel.mesh(config)
    loader = loaders.create(loader_name, "digits", "train[:90]", "", mesh)
    model, tx = parts.create_model(config, 10), parts.create_optimizer(config, 90)
    state = parts.initial_state(config, model, tx, loader.image_shape, mesh)
    epoch = partial(steps.train_epoch, model=model, tx=tx)
    epoch = epochs.compile_epoch(epoch, mesh, state, loader, 35, steps=3, length=3)

    indices, read = [], decoding.Examples.read
    decoding.Examples.read = lambda self, some: indices.extend(some) or read(self, some)
    (piece,) = loader.pieces(batches.train_batches(0, 0, 90, 35)[:, None], 3)
    decoding.Examples.read = read
    state, metrics = epoch(state, piece)
    leaves = jax.tree.leaves(jax.device_get(state))
    crc32 = zlib.crc32(b"".join(np.asarray(leaf).tobytes() for leaf in leaves))
    return crc32, float(metrics.loss_sum), len(indices)


if __name__ == "__main__":
    port, count, index = map(int, sys.argv[1:])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    for name in loaders.NAMES:
        print("trained", *train_on_two_devices(name))
