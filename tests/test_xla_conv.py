import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mnist_flax import xla_conv
from tests.helpers import normal, quick_jit


def plain(x, kernel, padding):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def with_gradients(conv, padding):
    def run(x, kernel):
        y, pullback = jax.vjp(lambda x, kernel: conv(x, kernel, padding), x, kernel)
        return y, *pullback(jnp.sin(y))

    return run


def twice_differentiated(conv, padding):
    def loss(x, kernel):
        return jnp.tanh(0.1 * conv(x, kernel, padding)).sum()

    def of_gradients(x, kernel):
        return sum(jnp.sin(g).sum() for g in jax.grad(loss, (0, 1))(x, kernel))

    return jax.grad(of_gradients, (0, 1))


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("function", [with_gradients, twice_differentiated])
@pytest.mark.parametrize("axes", [None, (0, 0), (0, None), (None, 0)])
def test_one_or_several_are_jaxs(function, padding, axes):
    x, kernel = normal(0, (3, 2, 7, 8, 4)), normal(1, (3, 2, 3, 4, 5))
    operands = [
        array[0] if axis is None else array
        for array, axis in zip((x, kernel), axes or (None, None), strict=True)
    ]

    def result(conv):
        run = function(conv, padding)
        return quick_jit(jax.vmap(run, axes) if axes else run)(*operands)

    for actual, expected in zip(result(xla_conv.convolution), result(plain), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


def test_several_stay_one_after_the_other(monkeypatch):
    def convolutions(count):
        operands = normal(0, (count, 2, 7, 8, 4)), normal(1, (count, 3, 2, 4, 5))
        several = jax.jit(jax.vmap(with_gradients(xla_conv.convolution, "VALID")))
        text = several.lower(*operands).as_text()
        return text.count("stablehlo.convolution("), bool(re.search("group_count = [^1]", text))

    monkeypatch.setattr(xla_conv, "_MOST", 3)
    assert convolutions(3) == (9, False)
    assert convolutions(4) == (3, True)
