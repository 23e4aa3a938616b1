"""How operands lie on the devices of a mesh, as far as a layer must know."""

import jax
from jax import lax

# The axis of `jax.vmap` over seeds: a name that no axis of a user has.
SEED_AXIS = "mnist_flax.seed"


def on_explicit_mesh(*operands: jax.Array) -> bool:
    """Whether any lies on a mesh with explicit axes, as `jax.make_mesh` makes them.

    JAX then wants a rule from every operation, and has none for reshaping or looping over parts of
    an axis that is shared out.
    """
    return any(jax.typeof(operand).sharding.mesh.explicit_axes for operand in operands)


def match_varying(*operands: jax.Array) -> list[jax.Array]:
    """The operands, each cast to vary over all axes of `shard_map` over which any of them does.

    A gradient written by hand must vary over the axes of its operand, and a weight's gradient
    varies as the images do.
    """
    varying = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    axes = frozenset().union(*varying)
    return [
        lax.pcast(operand, tuple(axes - own), to="varying") if axes - own else operand
        for operand, own in zip(operands, varying, strict=True)
    ]
