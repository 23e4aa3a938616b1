"""Pure step functions: no I/O, no jit, no Python state.

A caller binds the network and the optimiser and compiles once:

    epoch = jax.jit(partial(steps.train_epoch, model=model, tx=tx), donate_argnums=0)
    state, metrics = epoch(state, images, labels, rows)

Metrics are sums and counts over the examples that a mask lets through, so that padding never
counts and averages over unequal batches are exact.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from mnist_flax import block_updates, optim, share_keys
from mnist_flax.errors import UserError
from mnist_flax.state import TrainState, step_key


@flax.struct.dataclass
class Batch:
    """Examples of one step.

    Attributes:
        images: float32 [B, H, W, C] in [0, 1].
        labels: int32 [B].
        mask: float32 [B], 1 for an example and 0 for padding.
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array


@flax.struct.dataclass
class Metrics:
    """Sums over examples: the loss, correct predictions and their number (int32).

    `loss_sum` is float32; that of a single step with wider logits has their dtype. Metrics of
    several batches are added with `+`.
    """

    loss_sum: jax.Array
    correct: jax.Array
    count: jax.Array

    def __add__(self, other: "Metrics") -> "Metrics":
        return jax.tree.map(jnp.add, self, other)


def scale(images: jax.Array) -> jax.Array:
    """uint8 [0, 255] to float32 [0, 1].

    Raises:
        UserError: they are of another dtype.
    """
    if images.dtype != jnp.uint8:
        raise UserError(
            f"images of a data set are uint8 in [0, 255], and here are {images.dtype}: scaled ones "
            "make a steps.Batch for steps.train_step as they are"
        )
    return images.astype(jnp.float32) / 255


@jax.named_scope("gather_batch")
def gather(images: jax.Array, labels: jax.Array, indices: jax.Array) -> Batch:
    """The batch at `indices` of a data set on the device.

    Args:
        images: uint8 [N, H, W, C].
        labels: int32 [N].
        indices: int32 [B]; -1 stands for padding.
    """
    valid_indices = jnp.maximum(indices, 0)
    # A NumPy array cannot be indexed by a traced one.
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    return Batch(
        scale(images[valid_indices]), labels[valid_indices], (indices >= 0).astype(jnp.float32)
    )


def measure(logits: jax.Array, batch: Batch) -> Metrics:
    """Cross-entropy, correct predictions and count of a batch; logits [B, classes].

    The loss is that of Keras's categorical cross-entropy, without the 1e-7 at which Keras on some
    backends cuts off probabilities.
    """
    return _sum_examples(_measure_each(logits, batch))


def _measure_each(logits, batch):
    """`measure` of each example: arrays [B], which a loop adds up without a sum in every step."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    kept = batch.mask > 0
    return Metrics(
        # `where`, as 0 · inf would be NaN.
        loss_sum=jnp.where(kept, losses, 0),
        correct=((logits.argmax(-1) == batch.labels) & kept).astype(jnp.int32),
        count=kept.astype(jnp.int32),
    )


def _sum_examples(each):
    return jax.tree.map(lambda numbers: numbers.sum(-1, dtype=numbers.dtype), each)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update by the gradient of the mean loss over the batch's examples.

    Dropout uses `fold_in(state.key, state.step)`, of which each device on the axis has a share
    (`share_keys.of_share`): of a batch split evenly, in order, the result is that of one device but
    for rounding. A network with `nn.BatchNorm` must be given that axis too; its batch statistics
    count the padding of a short batch as images.

    Args:
        state: parameters, optimiser and key before the step.
        batch: the examples, with `axis_name` this device's share of them. On all devices together
            the mask lets at least one through.
        model: a network whose `apply` takes images and `train`, and gives logits [B, classes].
        tx: the optimiser that made `state.opt_state`.
        axis_name: under `jax.pmap` or `shard_map` the axis over which the batch is split.

    Returns:
        The state after the step and the metrics before it; with `axis_name` those of the whole
        batch, on every device.
    """
    count = _psum(axis_name, batch.mask.sum())
    update = partial(optim.update, tx)
    state, each = _step(state, batch, count, model=model, update=update, axis_name=axis_name)
    return state, _psum(axis_name, _sum_examples(each))


def _step(state, batch, count, *, model, update, axis_name):
    """`train_step` with the whole batch's count given, and metrics of each example."""
    key = step_key(state)
    if axis_name is not None:
        key = share_keys.of_share(key, lax.axis_index(axis_name))

    def loss_of(params):
        logits, updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch.images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        each = _measure_each(logits, batch)
        return each.loss_sum.sum() / count, (each, updated.get("batch_stats", {}))

    # A gradient with respect to what all devices share `shard_map` sums over them itself, and it
    # would be summed twice.
    params = _pvary(axis_name, state.params)
    grads, (each, batch_stats) = jax.grad(loss_of, has_aux=True)(params)
    grads = _psum(axis_name, grads)
    with jax.named_scope("optimizer"):
        params, opt_state = update(grads, state.opt_state, state.params)
    return state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        batch_stats=batch_stats,
    ), each


def eval_step(
    variables: Any, batch: Batch, *, model: nn.Module, axis_name: str | None = None
) -> Metrics:
    """The metrics of a batch; with `axis_name` of the whole batch, on every device.

    Args:
        variables: {"params": ..., "batch_stats": ...}.
        batch, model, axis_name: as `train_step` takes them.
    """
    logits = model.apply(variables, batch.images, train=False)
    return _psum(axis_name, measure(logits, batch))


def train_epoch(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    rows: jax.Array,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """`train_step` over each of `rows`, in one `lax.scan`.

    The data set stays on the device as uint8; only indices are new. An epoch may be given in
    pieces: the states are the same.

    Args:
        state, model, tx, axis_name: as `train_step` takes them.
        images: uint8 [N, H, W, C]; here they are scaled to [0, 1].
        labels: int32 [N].
        rows: int32 [steps, B], the indices of each batch's examples, with `axis_name` of the
            device's own share of them; -1 is padding. Each batch has an example, on all devices
            together.

    Returns:
        The state after the last step, and the metrics of all steps and devices together.
    """
    epoch = partial(_train_epoch, model=model, axis_name=axis_name)
    whole = partial(epoch, update=partial(optim.update, tx))
    shapes = block_updates.large_shapes(tx, state.params)
    if not shapes:
        return whole(state, images, labels, rows)
    like = jax.eval_shape(lambda opt_state: opt_state, state.opt_state)

    def in_blocks(state, *data):
        state = state.replace(opt_state=block_updates.split(shapes, state.opt_state))
        state, metrics = epoch(state, *data, update=partial(block_updates.update, tx, shapes, like))
        return state.replace(opt_state=block_updates.join(like, state.opt_state)), metrics

    return lax.platform_dependent(state, images, labels, rows, cpu=in_blocks, default=whole)


def _train_epoch(state, images, labels, rows, *, model, update, axis_name):
    # Devices wait for each other at every sum: in a step only the gradients' is left.
    counts = _psum(axis_name, (rows >= 0).sum(axis=1).astype(jnp.float32))

    def step(carry, row_and_count):
        (state, total), (row, count) = carry, row_and_count
        batch = gather(images, labels, row)
        state, each = _step(state, batch, count, model=model, update=update, axis_name=axis_name)
        return (state, _add(total, each)), None

    start = (state, _pvary(axis_name, _zero_metrics(rows)))
    (state, total), _ = lax.scan(step, start, (rows, counts))
    return state, _psum(axis_name, _sum_examples(total))


def _zero_metrics(rows):
    """Metrics of each place in a batch, [B], before the first."""
    size = rows.shape[-1]
    return Metrics(*(jnp.zeros(size, dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32)))


def _add(total, each):
    # The losses of a float64 network are of that dtype.
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, each)


def eval_epoch(
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    rows: jax.Array,
    *,
    model: nn.Module,
    axis_name: str | None = None,
) -> Metrics:
    """`eval_step` over each of `rows`, in one `lax.scan`.

    `variables` as `eval_step` takes them, the other arguments as `train_epoch`.
    """

    def step(total, row):
        batch = gather(images, labels, row)
        logits = model.apply(variables, batch.images, train=False)
        return _add(total, _measure_each(logits, batch)), None

    total, _ = lax.scan(step, _pvary(axis_name, _zero_metrics(rows)), rows)
    return _psum(axis_name, _sum_examples(total))


def averages(sums: Any) -> dict[str, Any]:
    """Means over examples as numbers, or of several seeds lists.

    Args:
        sums: has `loss_sum`, `correct` and `count` on the host, numbers or [seeds].
    """
    counts = np.asarray(sums.count, float)
    return {
        "loss": (np.asarray(sums.loss_sum, float) / counts).tolist(),
        "accuracy": (np.asarray(sums.correct, float) / counts).tolist(),
        "count": int(counts.flat[0]),
    }


def _psum(axis_name: str | None, tree: Any) -> Any:
    return tree if axis_name is None else lax.psum(tree, axis_name)


def _pvary(axis_name: str | None, tree: Any) -> Any:
    """Casts what all devices share to values that may differ from device to device."""
    return tree if axis_name is None else lax.pcast(tree, axis_name, to="varying")
