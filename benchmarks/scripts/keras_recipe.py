"""A recipe in Keras: python -m benchmarks.scripts.keras_recipe RECIPE AT_ONCE SEED SUMMARY.json

What the tutorials do: `fit` on arrays, shuffled each epoch; but the test images are scored once,
at the end, where most tutorials score them after every epoch too. The data are those of the
package. AT_ONCE is the number of such processes that share the machine.
"""

import platform
import random
import sys
import time
from pathlib import Path

import keras

from benchmarks import recipes
from benchmarks.peers import keras_fit
from mnist_flax import datasets, environment, rundir


def run(recipe: str, at_once: str, seed: str, file: str) -> None:
    # Starts JAX, which is none of Keras's work.
    device = environment.device_name()
    if not device.startswith("cpu"):
        keras_fit.require_gpu()
    began = time.perf_counter()
    config = recipes.config(recipe)
    train = datasets.load(config.data.name, config.data.train_split)
    test = datasets.load(config.data.name, config.data.test_split)
    # For weights and dropout. `keras.utils.set_random_seed` seeds TensorFlow too, with which `fit`
    # takes the examples in one and the same order in every epoch; the tutorials' did not.
    random.seed(int(seed))
    model = keras_fit.network(recipes.spec_of(config.model))
    model.compile(
        config.optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=keras_fit.STEPS_PER_EXECUTION,
    )
    images = train.images.astype("float32") / 255
    model.fit(images, train.labels, config.batch_size, config.epochs, verbose=2)
    images = test.images.astype("float32") / 255
    loss, accuracy = model.evaluate(images, test.labels, batch_size=500, verbose=0)

    packages = ("keras", "tensorflow", "numpy")
    summary = {
        "by": "keras",
        "seed": int(seed),
        "test_loss": loss,
        "test_accuracy": round(accuracy * len(test.labels)) / len(test.labels),
        "at_once": int(at_once),
        "wall_seconds": time.perf_counter() - began,
        "device": device,
        "versions": {"python": platform.python_version()}
        | {name: environment.version_of(name) for name in packages},
    }
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_json(path, summary)


if __name__ == "__main__":
    run(*sys.argv[1:])
