"""A Keras script: read MNIST, compile, fit one epoch, evaluate."""

import json
import sys
import time
from pathlib import Path

import keras
import numpy as np

from benchmarks.peers import keras_fit


class FirstStep(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            print("first step at", time.time())


def run(folder: str) -> None:
    job = json.loads(Path(folder, "job.json").read_text())
    if job["device"] == "gpu":
        keras_fit.require_gpu()
    with np.load(Path(folder, "data.npz")) as data:
        x_train, y_train = data["x_train"].astype("float32") / 255, data["y_train"]
        x_test, y_test = data["x_test"].astype("float32") / 255, data["y_test"]
    model = keras_fit.network(job["spec"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(job["optimizer"], loss, metrics=["accuracy"])
    model.fit(
        x_train, y_train, batch_size=job["batch_size"], epochs=1, verbose=0, callbacks=[FirstStep()]
    )
    print(model.evaluate(x_test, y_test, batch_size=500, verbose=0))


if __name__ == "__main__":
    run(*sys.argv[1:])
