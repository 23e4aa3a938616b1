"""Keras 3 as its users train: `Model.fit` on arrays. KERAS_BACKEND chooses the backend."""

import time

import keras
import numpy as np
from keras import layers

from benchmarks.peers import EPSILON, LEARNING_RATE, PROBE, RHO, Data, Job, Peer, jax_memory

# As many as pay: `larger` is 1.04 times as fast as with 20, and no faster with 300. Of the recipes
# in batches of 500 so many steps would take half a minute, and ten take some seconds.
STEPS_PER_EXECUTION, STEPS_OF_LARGE_BATCHES = 100, 10


def network(spec: dict | None) -> keras.Model:
    """The network as the tutorials write it, but that it ends in logits.

    `branched` pools before it concatenates, with the same result.
    """

    def conv(features, kernel, padding="valid"):
        return layers.Conv2D(features, kernel, padding=padding, activation="relu")

    image = keras.Input((28, 28, 1))
    if spec is None:
        x = layers.MaxPooling2D()(conv(32, 3, "same")(image))
        branches = []
        for _ in range(2):
            y = layers.MaxPooling2D()(conv(64, 3, "same")(x))
            branches.append(layers.MaxPooling2D()(conv(256, 3, "same")(y)))
        x = layers.Flatten()(layers.Concatenate()(branches))
        for features in (1000, 500):
            x = layers.Dense(features, activation="relu")(x)
        return keras.Model(image, layers.Dense(10, dtype="float32")(x))
    x = image
    for features, kernel, pooled in spec["convs"]:
        x = conv(features, kernel)(x)
        x = layers.MaxPooling2D()(x) if pooled else x
    x = layers.Dropout(spec["conv_dropout"])(x) if spec["conv_dropout"] else x
    x = layers.Flatten()(x)
    for features in spec["dense"]:
        x = layers.Dense(features, activation="relu")(x)
    x = layers.Dropout(spec["dense_dropout"])(x) if spec["dense_dropout"] else x
    return keras.Model(image, layers.Dense(10, dtype="float32")(x))


def require_gpu() -> None:
    """Raises SystemExit where TensorFlow would compute on the CPU."""
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        raise SystemExit("TensorFlow sees no GPU: pip install 'tensorflow[and-cuda]'")


class Clock(keras.callbacks.Callback):
    """The seconds of an epoch, without what `fit` does before and after."""

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.begun


def create(job: Job, data: Data, variant: str) -> Peer:
    on_tensorflow = keras.backend.backend() == "tensorflow"
    if on_tensorflow and job.device == "gpu":
        require_gpu()
    if job.dtype == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    model = network(job.spec)
    optimizer = (
        keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON)
        if job.optimizer == "adam"
        else keras.optimizers.RMSprop(LEARNING_RATE, rho=RHO, epsilon=EPSILON)
    )
    multiple, ways = 1, variant.split()
    if "steps" in ways:
        steps = STEPS_OF_LARGE_BATCHES if job.batch_size >= 500 else STEPS_PER_EXECUTION
        multiple = min(steps, len(data.rows))
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=multiple,
        # Keras's own choice on TensorFlow is XLA on a GPU, and not on a CPU.
        jit_compile=True if "jit" in ways else False if "nojit" in ways else "auto",
    )
    # The batches of the epoch, one after the other.
    order = data.rows.ravel()
    x, y = data.images[order].astype(np.float32), data.labels[order]
    x /= 255
    probe = data.images[PROBE].astype(np.float32) / 255
    clock, end = Clock(), len(data.rows) // multiple * multiple
    begin = 0

    def run(least: int) -> tuple[int, float]:
        nonlocal begin
        steps = -(-least // multiple) * multiple
        seconds, left = 0.0, steps
        while left:
            now = min(left, end - begin)
            examples = slice(begin * job.batch_size, (begin + now) * job.batch_size)
            begin = (begin + now) % end
            model.fit(
                x[examples],
                y[examples],
                batch_size=job.batch_size,
                shuffle=False,
                verbose=0,
                callbacks=[clock],
            )
            seconds, left = seconds + clock.seconds, left - now
        return steps, seconds

    def loss() -> float:
        logits = model.predict_on_batch(probe)
        shifted = logits - logits.max(-1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        labels = data.labels[PROBE]
        return float(-log_probabilities[np.arange(len(labels)), labels].mean())

    def device_memory() -> int | None:
        if job.device == "cpu":
            return None
        if on_tensorflow:
            import tensorflow as tf

            return tf.config.experimental.get_memory_info("GPU:0")["peak"]
        return jax_memory()

    return Peer(model.count_params(), run, loss, device_memory)
