import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mnist_flax import (
    conv_pair,
    cpu_conv,
    dense,
    layers,
    pooling,
    side_by_side,
    tiles,
    winograd,
    winograd_narrow,
    xla_conv,
)
from mnist_flax.errors import UserError
from tests.helpers import normal, plain_convolution, quick_jit


@pytest.fixture(autouse=True)
def traced_anew(monkeypatch):
    """Has a test see what it patches, whatever was traced before."""
    monkeypatch.setattr(layers, "_by_platform", layers._by_platform.__wrapped__)


def reference_conv(x, kernel, bias, padding):
    return nn.relu(plain_convolution(x, kernel, padding) + bias)


def reference_conv_pool(x, kernel, bias, padding):
    return nn.max_pool(reference_conv(x, kernel, bias, padding), (2, 2), (2, 2))


REFERENCES = {layers.conv_relu: reference_conv, layers.conv_relu_pool: reference_conv_pool}
both = pytest.mark.parametrize("conv", REFERENCES)


def assert_same(conv, x, kernel, padding, tolerance, reference=None):
    bias = normal(2, kernel.shape[3:], kernel.dtype)

    def with_gradients(conv):
        @quick_jit
        def run(x, kernel, bias):
            y, pullback = jax.vjp(lambda *operands: conv(*operands, padding), x, kernel, bias)
            return y, *pullback(jnp.sin(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

        return run(x, kernel, bias)

    pairs = zip(with_gradients(conv), with_gradients(reference or REFERENCES[conv]), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == expected.dtype
        actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
        np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("padding", "images"), [("VALID", 6), ("SAME", 2), ("VALID", None)])
@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 5), (4, 2)])
@pytest.mark.parametrize("channels", [3, 32])
@both
def test_conv_is_xlas_convolution(monkeypatch, conv, padding, kernel_size, channels, images):
    if images:
        monkeypatch.setattr(side_by_side, "_MAX_IMAGES", images)
        monkeypatch.setattr(cpu_conv, "_BLOCK_BYTES", 25_000 * images)
        monkeypatch.setattr(tiles, "_MIN_SPLIT", 1)
    x = normal(0, (6, 9, 12, channels))
    kernel = normal(1, (*kernel_size, channels, 7))
    assert_same(conv, x, kernel, padding, 4e-6)


@pytest.mark.parametrize(
    ("default", "conv"),
    [
        (xla_conv.conv_relu, layers.conv_relu),
        (xla_conv.conv_relu_pool, layers.conv_relu_pool),
    ],
)
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-2)])
def test_what_is_lowered_elsewhere_is_the_same(default, conv, padding, dtype, tolerance):
    # Of both outputs one side is odd.
    x, kernel = normal(0, (3, 9, 8, 4), dtype), normal(1, (3, 3, 4, 6), dtype)
    assert_same(default, x, kernel, padding, tolerance, REFERENCES[conv])
    x = jnp.round(nn.relu(x))
    assert_same(default, x, jnp.ones_like(kernel), padding, tolerance, REFERENCES[conv])


@pytest.mark.parametrize("kernel_size", [(3, 3), (4, 3), (5, 5)])
@pytest.mark.parametrize(("size", "split"), [((6, 9), False), ((7, 11), True), ((23, 20), True)])
@both
def test_winograd_is_xlas_convolution(monkeypatch, conv, kernel_size, size, split):
    x, kernel = normal(0, (3, *size, 32)), normal(1, (*kernel_size, 32, 34))
    assert winograd.suits(x, kernel)
    if split:
        monkeypatch.setattr(winograd, "_MAX_TILES", 16)
        monkeypatch.setattr(tiles, "_MIN_SPLIT", 1)
    assert_same(conv, x, kernel, "VALID", 2e-5)


# One tile, sides that are even and odd, and a batch whose last block is filled up.
@pytest.mark.parametrize(("batch", "size"), [(16, (4, 5)), (20, (9, 12)), (37, (13, 7))])
@pytest.mark.parametrize("channels", [8, 30])
def test_narrow_winograd_is_xlas_convolution(batch, size, channels):
    x, kernel = normal(0, (batch, *size, channels)), normal(1, (3, 3, channels, 15))
    assert winograd_narrow.suits(x, kernel)
    assert_same(layers.conv_relu_pool, x, kernel, "VALID", 4e-6)


@pytest.mark.parametrize("batch_and_kernel", [(15, 3, 3, 8, 8), (16, 3, 2, 8, 8), (16, 3, 3, 7, 8)])
def test_narrow_winograd_is_for_batches_and_kernels_that_it_suits(batch_and_kernel):
    batch, *shape = batch_and_kernel
    x = jnp.zeros((batch, 9, 9, shape[2]))
    assert not winograd_narrow.suits(x, jnp.zeros(shape))
    wide = jnp.zeros((16, 9, 9, 8), jnp.bfloat16), jnp.zeros((3, 3, 8, 8), jnp.bfloat16)
    assert not winograd_narrow.suits(*wide)


@pytest.mark.parametrize(
    ("pool", "size", "in_one_loop"), [(True, 3, True), (False, 5, True), (True, 3, False)]
)
def test_two_convolutions_in_one_loop_are_one_after_the_other(monkeypatch, pool, size, in_one_loop):
    # Blocks of two images, the last filled up.
    monkeypatch.setattr(tiles, "_MIN_SPLIT", 1 if in_one_loop else 6)
    monkeypatch.setattr(winograd, "_MAX_TILES", 2 * {3: 9, 5: 4}[size])
    x, kernels = normal(0, (5, 14, 13, 2)), [(3, 4, 2, 32), (size, size, 32, 33)]
    weights = [a for n, k in enumerate(kernels) for a in (normal(n, k), normal(n, k[3:]))]
    assert conv_pair._suits(x, weights[0], weights[2]) == in_one_loop

    def reference(x, kernel1, bias1, kernel2, bias2):
        second = reference_conv_pool if pool else reference_conv
        return second(reference_conv(x, kernel1, bias1, "VALID"), kernel2, bias2, "VALID")

    def with_gradients(conv):
        y, pullback = jax.vjp(conv, x, *weights)
        return y, *pullback(jnp.sin(jnp.arange(y.size)).reshape(y.shape))

    expected = quick_jit(partial(with_gradients, reference))()
    forms = [conv_pair.conv_relu_twice, xla_conv.conv_relu_twice]
    for form in forms if in_one_loop else forms[:1]:
        actual = quick_jit(partial(with_gradients, partial(form, pool=pool)))()
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("channels", [1, 40])
def test_conv_in_bfloat16_sums_in_float32(channels):
    x = normal(0, (4, 8, 8, channels), jnp.bfloat16)
    kernel = normal(1, (3, 3, channels, 8), jnp.bfloat16)
    assert_same(layers.conv_relu, x, kernel, "VALID", 2e-2)
    # The one rounding is the result's own: sums of about 20 that cancel would show others.
    zero = jnp.zeros(8, jnp.bfloat16)
    exact = reference_conv(x.astype(jnp.float32), kernel.astype(jnp.float32), 0, "VALID")
    y = quick_jit(partial(layers.conv_relu, padding="VALID"))(x, kernel, zero)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 4, 50])
@both
def test_gradients_in_bfloat16(conv, batch):
    x = normal(0, (batch, 8, 8, 40), jnp.bfloat16)
    kernel = normal(1, (3, 3, 40, 8), jnp.bfloat16)

    def reference(*operands):
        wide = (a.astype(jnp.float32) for a in operands[:3])
        return REFERENCES[conv](*wide, operands[3]).astype(jnp.bfloat16)

    assert_same(conv, x, kernel, "SAME", 2e-2, reference)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 4e-6), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize("channels", [3, 40])
@both
def test_a_gradient_is_differentiated_again(conv, channels, dtype, tolerance):
    x = normal(0, (4, 8, 8, channels), dtype)
    kernel = normal(1, (3, 3, channels, 32), dtype)

    def penalty(conv, kernel, x, dtype):
        operands = kernel.astype(dtype), x.astype(dtype)

        def loss(kernel, x):
            y = conv(x, kernel, jnp.zeros(32, dtype), "VALID").astype(jnp.float32)
            return jnp.sum(y**2)

        return sum(jnp.mean(g.astype(jnp.float32) ** 2) for g in jax.grad(loss, (0, 1))(*operands))

    def gradients(conv, dtype):
        wide = (each.astype(jnp.float32) for each in (kernel, x))
        return quick_jit(jax.grad(partial(penalty, conv, dtype=dtype), (0, 1)))(*wide)

    pairs = zip(gradients(conv, dtype), gradients(REFERENCES[conv], jnp.float32), strict=True)
    for actual, expected in pairs:
        np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


def test_splitter():
    def shape(batch, most):
        return tiles.splitter(batch, most)(jnp.zeros((batch, 2))).shape

    # A batch of 37, which only 1 divides, is filled up to eight blocks of 5, 29 to two of 15.
    assert (shape(37, 5), shape(16, 5), shape(20, 5)) == ((8, 5, 2), (4, 4, 2), (4, 5, 2))
    assert (shape(29, 25), shape(15, 5)) == ((2, 15, 2), (1, 15, 2))


@pytest.mark.parametrize("batch", [1, 7, 12])
@both
def test_blocks_of_the_batch(monkeypatch, conv, batch):
    monkeypatch.setattr(tiles, "_MIN_SPLIT", 1)
    # Five fit; a batch of 7, which only 1 divides, is filled up to two blocks of 4.
    monkeypatch.setattr(side_by_side, "_MAX_IMAGES", 5)
    bytes_per_image = 6 * 6 * (3 * 3 * 16 + 8) * 4
    monkeypatch.setattr(cpu_conv, "_BLOCK_BYTES", 6 * bytes_per_image - 1)
    x, kernel = normal(0, (batch, 6, 6, 16)), normal(1, (3, 3, 16, 8))
    assert_same(conv, x, kernel, "VALID", 4e-6)
    program = str(jax.make_jaxpr(partial(conv, padding="VALID"))(x, kernel, jnp.zeros(8)))
    blocks = {1: 1, 7: 2, 12: 3}[batch]
    assert f"length={blocks}\n" in program
    monkeypatch.setattr(tiles, "_MIN_SPLIT", 13)
    program = str(jax.make_jaxpr(partial(conv, padding="VALID"))(x, kernel, jnp.zeros(8)))
    assert "length=1\n" in program


def test_blocks_of_five_where_they_divide_the_batch_or_else_up_to_eight():
    conv = partial(layers.conv_relu_pool, padding="VALID")

    def blocks(batch):
        operands = jnp.zeros((batch, 8, 8, 1)), normal(1, (3, 3, 1, 4)), jnp.zeros(4)
        return int(re.search(r"length=(\d+)\n", str(jax.make_jaxpr(conv)(*operands)))[1])

    assert [blocks(batch) for batch in (8, 32, 60, 100, 200)] == [1, 4, 12, 20, 40]


@both
def test_an_empty_batch(conv):
    y = conv(jnp.zeros((0, 8, 8, 3)), normal(1, (3, 3, 3, 4)), jnp.zeros(4), "VALID")
    assert y.shape == {layers.conv_relu: (0, 6, 6, 4), layers.conv_relu_pool: (0, 3, 3, 4)}[conv]


@both
def test_conv_is_lowered_for_each_platform(conv):
    def lowered(platform):
        operands = normal(0, (2, 8, 8, 3)), normal(1, (3, 3, 3, 4)), jnp.zeros(4)
        traced = jax.jit(partial(conv, padding="VALID")).trace(*operands)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.convolution" in lowered("cuda")
    assert "stablehlo.convolution" in lowered("tpu")
    assert "stablehlo.convolution" not in lowered("cpu")
    assert "stablehlo.dot_general" in lowered("cpu")


@pytest.mark.parametrize("shape", [(3, 8, 8, 5), (2, 7, 9, 1), (1, 2, 2, 3), (2, 5, 4, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool_is_linens(shape, dtype, ties):
    x = normal(0, shape, dtype)
    if ties:
        x = jnp.round(nn.relu(x))
    g = normal(1, (shape[0], shape[1] // 2, shape[2] // 2, shape[3]), dtype)

    def with_gradient(pool):
        @jax.jit
        def run(x, g):
            y, pullback = jax.vjp(pool, x)
            return y, pullback(g)[0]

        return run(x, g)

    y, dx = with_gradient(pooling.max_pool)
    expected, expected_dx = with_gradient(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(dx, expected_dx)


def test_max_pool_keeps_nan():
    x = jnp.ones((1, 2, 2, 1)).at[0, 1, 0, 0].set(jnp.nan)
    assert jnp.isnan(pooling.max_pool(x)).all()


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_conv_module_has_linens_parameters_and_results(pool, padding):
    x = normal(0, (3, 11, 10, 4))
    ours = layers.Conv(6, (3, 3), padding=padding, pool=pool)
    linens = nn.Conv(6, (3, 3), padding=padding)
    shapes, linens_shapes = (
        jax.eval_shape(module.init, jax.random.key(0), x)["params"] for module in (ours, linens)
    )
    assert shapes == linens_shapes
    params = {"kernel": normal(1, (3, 3, 4, 6)), "bias": normal(2, (6,))}

    def reference(params, x):
        y = nn.relu(linens.apply({"params": params}, x))
        return nn.max_pool(y, (2, 2), (2, 2)) if pool else y

    def with_gradients(network):
        @quick_jit
        def run(params, x):
            y, pullback = jax.vjp(network, params, x)
            return y, pullback(jnp.sin(jnp.arange(y.size)).reshape(y.shape))

        return run(params, x)

    actual = with_gradients(lambda params, x: ours.apply({"params": params}, x))
    expected = with_gradients(reference)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), actual, expected)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("batch", [0, 1, 8, 9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_product_has_the_gradients_of_dot_general(batch, dtype, on_cpu, monkeypatch):
    if not on_cpu:
        monkeypatch.setattr(
            dense.lax, "platform_dependent", lambda *args, cpu, default: default(*args)
        )
    operands = normal(0, (batch, 30), dtype), normal(1, (30, 20), dtype)
    numbers = (((1,), (0,)), ((), ()))

    def with_gradients(product):
        y, pullback = jax.vjp(lambda x, kernel: product(x, kernel, numbers), *operands)
        return y, *pullback(jnp.sin(jnp.arange(y.size, dtype=dtype)).reshape(y.shape))

    tolerance = 1e-5 if dtype == jnp.float32 else 5e-2
    pairs = zip(with_gradients(dense.dot_general), with_gradients(lax.dot_general), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == expected.dtype
        actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
        np.testing.assert_allclose(actual, expected, atol=tolerance)


@pytest.mark.parametrize("batch", [8, 9])
def test_a_dense_kernels_gradient_in_bfloat16_is_summed_in_float32(batch):
    x, g = (normal(seed, (batch, n), jnp.bfloat16) for seed, n in ((0, 300), (1, 200)))
    kernel, numbers = normal(2, (300, 200), jnp.bfloat16), (((1,), (0,)), ((), ()))
    _, pullback = jax.vjp(lambda kernel: dense.dot_general(x, kernel, numbers), kernel)
    exact = np.asarray(x, np.float32).T @ np.asarray(g, np.float32)
    # The one rounding is the result's own.
    np.testing.assert_allclose(pullback(g)[0].astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)


def test_a_dense_product_takes_more_axes():
    x, kernel = normal(0, (2, 5, 3)), normal(1, (3, 4))
    product = partial(dense.dot_general, dimension_numbers=(((2,), (0,)), ((), ())))
    y, pullback = jax.vjp(product, x, kernel)
    np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(kernel), rtol=1e-5)
    _, dkernel = pullback(y)
    expected = np.einsum("abk,abf->kf", x, y)
    np.testing.assert_allclose(dkernel, expected, rtol=1e-4)


def test_a_precision_asked_of_a_dense_product_is_kept():
    operands, numbers = (normal(0, (9, 3)), normal(1, (3, 2))), (((1,), (0,)), ((), ()))
    product = partial(dense.dot_general, dimension_numbers=numbers, precision="highest")
    assert "HIGHEST" in str(jax.make_jaxpr(product)(*operands))


def test_images_too_small_are_refused():
    kernel, bias = normal(1, (5, 5, 1, 2)), jnp.zeros(2)
    with pytest.raises(UserError, match="4×9 pixels reach a 5×5 convolution"):
        layers.conv_relu(normal(0, (1, 4, 9, 1)), kernel, bias, "VALID")
    with pytest.raises(UserError, match="1×3 pixels reach a 2×2 max-pool"):
        pooling.max_pool(normal(0, (1, 1, 3, 1)))
    with pytest.raises(UserError, match="1×3 pixels reach a 2×2 max-pool"):
        layers.conv_relu_pool(normal(0, (1, 5, 7, 1)), kernel, bias, "VALID")


@both
def test_ties_and_nan_go_the_way_of_linens_pool(conv):
    x = jnp.round(normal(0, (2, 7, 8, 1))).at[0, 3, 3, 0].set(jnp.nan)
    kernel, bias = jnp.ones((2, 2, 1, 3)), jnp.ones(3)
    actual, expected = (
        jax.jit(lambda x, conv=conv: conv(x, kernel, bias, "VALID"))(x)
        for conv in (conv, REFERENCES[conv])
    )
    np.testing.assert_array_equal(actual, expected)
    assert_same(conv, jnp.nan_to_num(x), kernel, "VALID", 1e-6)


def test_dropout():
    x = normal(0, (64, 33, 25)) + 10
    key = jax.random.key(0)
    y = layers.Dropout(0.2).apply({}, x, train=True, rngs={"dropout": key})
    kept = y != 0
    np.testing.assert_allclose(y[kept], x[kept] / 0.8, rtol=1e-5)
    # Within four deviations of a share of 52,800 draws, over all and between neighbours.
    assert abs(kept.mean() - 0.8) < 4 * np.sqrt(0.2 * 0.8 / x.size)
    neighbours = kept.ravel()[1:] & kept.ravel()[:-1]
    assert abs(neighbours.mean() - 0.64) < 4 * np.sqrt(0.64 * 0.36 * 2 / x.size)
    # One random number serves the same place of two examples.
    first, second = kept[::2], kept[1::2]
    assert abs((first & second).mean() - 0.64) < 4 * np.sqrt(0.64 * 0.36 / first.size)
    other = layers.Dropout(0.2).apply({}, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert abs(((other != 0) & kept).mean() - 0.64) < 4 * np.sqrt(0.64 * 0.36 / x.size)
    np.testing.assert_array_equal(layers.Dropout(0.2).apply({}, x, train=False), x)
    all_dropped = layers.Dropout(1.0).apply({}, x, train=True, rngs={"dropout": key})
    np.testing.assert_array_equal(all_dropped, np.zeros_like(x))


def test_dropout_scales_bfloat16_by_no_rounded_factor():
    x = normal(0, (1000,)).astype(jnp.bfloat16)
    y = layers.Dropout(0.25).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    expected = (x.astype(jnp.float32) / 0.75).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y[y != 0], expected[y != 0])
    assert y.dtype == jnp.bfloat16
