"""A plain Flax loop: `nn.Conv`, one jitted step a batch, taken from arrays on the device."""

import time
from functools import partial
from itertools import count

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from benchmarks.peers import EPSILON, LEARNING_RATE, PROBE, RHO, Data, Job, Peer, jax_memory


class Network(nn.Module):
    spec: tuple | None
    dtype: str

    @nn.compact
    def __call__(self, x, train: bool):
        pool = partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
        conv, dense = (partial(layer, dtype=self.dtype) for layer in (nn.Conv, nn.Dense))
        if self.spec is None:
            conv = partial(conv, kernel_size=(3, 3), padding="SAME")
            x = pool(nn.relu(conv(32)(x)))
            branches = [pool(nn.relu(conv(256)(pool(nn.relu(conv(64)(x)))))) for _ in range(2)]
            x = jnp.concatenate(branches, axis=-1).reshape(x.shape[0], -1)
            x = nn.relu(dense(500)(nn.relu(dense(1000)(x))))
            return nn.Dense(10)(x)
        spec = dict(self.spec)
        for features, kernel, pooled in spec["convs"]:
            x = nn.relu(conv(features, (kernel, kernel), padding="VALID")(x))
            x = pool(x) if pooled else x
        x = nn.Dropout(spec["conv_dropout"], deterministic=not train)(x)
        x = x.reshape(x.shape[0], -1)
        for features in spec["dense"]:
            x = nn.relu(dense(features)(x))
        x = nn.Dropout(spec["dense_dropout"], deterministic=not train)(x)
        return nn.Dense(10)(x)


def network(spec: dict | None, dtype: str = "float32") -> Network:
    # A module's attributes must be hashable.
    spec = spec and tuple((key, _hashable(value)) for key, value in spec.items())
    return Network(spec, dtype)


def create(job: Job, data: Data, variant: str) -> Peer:
    images = jnp.asarray(data.images, jnp.float32) / 255
    labels, rows = jnp.asarray(data.labels), jnp.asarray(data.rows)
    model = network(job.spec, job.dtype)
    tx = (
        optax.adam(LEARNING_RATE, eps=EPSILON)
        if job.optimizer == "adam"
        else optax.rmsprop(LEARNING_RATE, decay=RHO, eps=EPSILON)
    )
    init = jax.jit(partial(model.init, train=False))
    params = init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    key = jax.random.key(1)

    def loss_of(params, x, y, train, rngs=None):
        logits = model.apply({"params": params}, x, train=train, rngs=rngs)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, (logits.argmax(-1) == y).mean()

    # The batch is taken inside, by a number on the device: outside, JAX would compile a program
    # for each row.
    @partial(jax.jit, donate_argnums=0)
    def train_step(state, images, labels, rows, i):
        row = rows[i]
        x, y = images[row], labels[row]
        rngs = {"dropout": jax.random.fold_in(key, state.step)}
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, accuracy), grads = gradient(state.params, x, y, True, rngs)
        return state.apply_gradients(grads=grads), loss, accuracy

    evaluate = jax.jit(partial(loss_of, train=False))
    turn = count()

    def run(steps: int) -> tuple[int, float]:
        nonlocal state
        losses, accuracies = [], []
        clock = time.perf_counter()
        for _ in range(steps):
            i = np.int32(next(turn) % len(rows))
            state, loss, accuracy = train_step(state, images, labels, rows, i)
            losses.append(loss)
            accuracies.append(accuracy)
        jax.block_until_ready((state, losses, accuracies))
        return steps, time.perf_counter() - clock

    def loss() -> float:
        return float(evaluate(state.params, images[PROBE], labels[PROBE])[0])

    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Peer(parameters, run, loss, jax_memory)


def _hashable(value):
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
