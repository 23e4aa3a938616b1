import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax import shardings, xla_conv
from tests.helpers import normal, plain_convolution, quick_jit


def with_gradients(conv, padding):
    def run(x, kernel):
        y, pullback = jax.vjp(lambda x, kernel: conv(x, kernel, padding), x, kernel)
        return y, *pullback(jnp.sin(y))

    return run


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_several_are_jaxs(padding, count, axes):
    operands = [
        normal(seed, shape if axis is None else (count, *shape))
        for seed, (shape, axis) in enumerate(zip([(2, 7, 8, 4), (3, 2, 4, 5)], axes, strict=True))
    ]

    def result(conv):
        run = with_gradients(conv, padding)
        return quick_jit(jax.vmap(run, axes, axis_name=shardings.SEED_AXIS))(*operands)

    for actual, expected in zip(
        result(xla_conv.convolution), result(plain_convolution), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_several_stay_one_after_the_other(monkeypatch):
    def convolutions(count, **name):
        operands = normal(0, (count, 2, 7, 8, 4)), normal(1, (count, 3, 2, 4, 5))
        several = jax.vmap(with_gradients(xla_conv.convolution, "VALID"), **name)
        text = jax.jit(several).lower(*operands).as_text()
        return text.count("stablehlo.convolution("), bool(re.search("group_count = [^1]", text))

    monkeypatch.setattr(xla_conv, "_MAX_SEEDS", 3)
    assert convolutions(3) == (3, True)
    assert convolutions(3, axis_name=shardings.SEED_AXIS) == (9, False)
    assert convolutions(4, axis_name=shardings.SEED_AXIS) == (3, True)
