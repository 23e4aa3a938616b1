"""What tests share.

Inputs are drawn by NumPy: JAX would compile a program for each shape, in half a second each.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mnist_flax import state

# The older way to compile fusions, which takes half the time; from JAX 0.11 on there is no choice.
_OLD_FUSIONS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
_QUICKLY = {"xla_backend_optimization_level": 0} | _OLD_FUSIONS
# `jax.jit` for what runs once or twice: LLVM's optimisations take longer than they save. Not where
# two programs must give the same bits, which are then compiled as users have them.
quick_jit = partial(jax.jit, compiler_options=_QUICKLY)
# For what runs a hundred times, where they pay.
loop_jit = partial(jax.jit, compiler_options=_OLD_FUSIONS)


def quick(mapped, *operands):
    """The same of a function that `jax.pmap` made, for such operands."""
    return mapped.lower(*operands).compile(_QUICKLY)


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def uniform(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)


def integers(seed, shape, stop, dtype=jnp.int32):
    return jnp.asarray(np.random.default_rng(seed).integers(0, stop, shape), dtype)


def plain_convolution(x, kernel, padding):
    """JAX's, of [B, H, W, C] with [KH, KW, C, F]."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)


def random_variables(model, image_shape=(28, 28, 1)):
    """Kernels of unit gain and biases other than zero."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        gain = np.sqrt(2 / fan_in) if len(leaf.shape) > 1 else 0.1
        return jnp.asarray(gain * rng.standard_normal(leaf.shape), leaf.dtype)

    image = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    return jax.tree.map(draw, shapes)


def random_state(model, tx, image_shape=(28, 28, 1)):
    """A state with `random_variables`, at step 0."""
    variables = random_variables(model, image_shape)
    return state.TrainState(
        step=jnp.zeros([], jnp.int32),
        params=variables["params"],
        opt_state=tx.init(variables["params"]),
        batch_stats=variables.get("batch_stats", {}),
        key=jnp.array([1, 2], jnp.uint32),
    )
