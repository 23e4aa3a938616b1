"""An optimiser's update block by block, so that large arrays go through memory once a step on CPU.

XLA makes a pass over memory for each moment of an array, and one for the array itself. In blocks
of rows that stay in the cache, the later passes read there what the earlier ones wrote. The
moments are then separate arrays, one for each block, from the first step of a program to its last.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mnist_flax import optim

Shape = tuple[int, ...]

# Numbers of a block: 1 MiB, which with its moments stays in the caches of two cores.
_BLOCK_SIZE = 2**18
# With fewer numbers an array gains nothing.
_MIN_SIZE = 2**21


def large_shapes(tx: optax.GradientTransformation, params: Any) -> set[Shape]:
    """The shapes of the parameters to update in blocks; none unless `tx` is elementwise."""
    if not isinstance(tx, optim.Elementwise):
        return set()
    return {p.shape for p in jax.tree.leaves(params) if p.size >= _MIN_SIZE}


def split(shapes: set[Shape], tree: Any) -> Any:
    """The tree with a list of blocks in place of each array of these shapes."""
    return jax.tree.map(
        lambda a: [a[rows] for rows in _blocks(a.shape)] if a.shape in shapes else a, tree
    )


def join(like: Any, tree: Any) -> Any:
    """The inverse of `split` for a tree like `like`."""
    return jax.tree.map(lambda _, a: jnp.concatenate(a) if isinstance(a, list) else a, like, tree)


def update(
    tx: optim.Elementwise, shapes: set[Shape], like: Any, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    """`optim.update` with parameters of these shapes in blocks.

    Args:
        tx, grads, params: as `optim.update` takes them.
        shapes: what `large_shapes` gives.
        like: a state of `tx` that is not split; it may be abstract.
        opt_state: a state of `tx` that is.

    Returns:
        The parameters, and the state, which is split again.
    """

    def small(like, tree):
        return jax.tree.map(lambda a, b: None if a.shape in shapes else b, like, tree)

    small_params, small_state = optim.update(
        tx, small(params, grads), small(like, opt_state), small(params, params)
    )
    grads = split(shapes, grads)
    for shape in sorted(shapes):
        for i, rows in enumerate(_blocks(shape)):
            params, opt_state = _update_block(
                tx, shape, i, rows.start, like, grads, opt_state, params
            )
    return _replaced(params, params, small_params), _replaced(like, opt_state, small_state)


def _update_block(tx, shape, i, start, like, grads, opt_state, params):
    """Parameters and state with the blocks i of this shape new, which begin at row `start`."""

    def waiting(p, g):
        if not start:
            return g[i]
        # XLA would make the first pass of all blocks before the second of any. This reads rows on
        # both sides of the edge: of the row before alone, XLA would read the update instead of the
        # array, and copy the array.
        edge = p[start - 1 : start + 1].reshape(2, -1)[:, 0]
        return g[i] + 0 * edge.sum()

    def own_state(a, b):
        # Scalars belong to all blocks.
        return b if not a.ndim else b[i] if a.shape == shape else None

    def write(p, new):
        # In place: XLA copies nothing where nothing reads the old numbers later.
        return p if new is None else lax.dynamic_update_slice_in_dim(p, new, start, axis=0)

    def of_shape(f, *trees):
        return jax.tree.map(lambda a, *b: f(a, *b) if a.shape == shape else None, params, *trees)

    own_grads = of_shape(waiting, grads)
    own_params = of_shape(lambda p, g: lax.slice_in_dim(p, start, start + len(g)), own_grads)
    new_params, new_state = optim.update(
        tx, own_grads, jax.tree.map(own_state, like, opt_state), own_params
    )
    opt_state = jax.tree.map(
        lambda a, b, new: [*b[:i], new, *b[i + 1 :]] if a.shape == shape else b,
        like,
        opt_state,
        new_state,
    )
    return jax.tree.map(write, params, new_params), opt_state


def _replaced(like, tree, new):
    return jax.tree.map(lambda _, old, new: old if new is None else new, like, tree, new)


def _blocks(shape):
    """The rows of each block."""
    rows = max(1, _BLOCK_SIZE // math.prod(shape[1:]))
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]
