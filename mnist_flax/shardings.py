"""How operands lie on the devices of a mesh, as far as a layer must know."""

import jax
from jax import lax


def explicit(*operands: jax.Array) -> bool:
    """Whether any lies on a mesh with explicit axes, as `jax.make_mesh` makes them.

    JAX then wants a rule from every operation, and has none for reshaping or looping over parts of
    an axis that is shared out.
    """
    return any(jax.typeof(operand).sharding.mesh.explicit_axes for operand in operands)


def alike(*operands: jax.Array) -> list[jax.Array]:
    """The operands, all varying over the axes of `shard_map` over which any of them does.

    A written-out gradient must vary as its operand does, and that of a weight does as the images.
    """
    varying = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    axes = frozenset().union(*varying)
    return [
        lax.pcast(operand, tuple(axes - own), to="varying") if axes - own else operand
        for operand, own in zip(operands, varying, strict=True)
    ]
