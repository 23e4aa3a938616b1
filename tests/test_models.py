import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from mnist_flax import config as config_lib
from mnist_flax import layers, models, parts, summary
from mnist_flax.errors import UserError
from mnist_flax.state import count_parameters
from tests.helpers import quick_jit, random_variables, uniform

PARAMETERS = {
    "branched": 5_447_246,
    "convnet": 93_322,
    "double_conv_3x3": 1_199_882,
    "double_conv_5x5": 872_714,
    "single_conv_5x5": 592_074,
    "baseline": 592_074,
    "larger": 59_933,
}

# What the tutorials print, or would: the output shape of each layer and its parameters.
LAYERS = {
    "branched": [
        ((28, 28, 32), 320),
        ((14, 14, 32), 0),
        ((14, 14, 64), 18_496),
        ((7, 7, 64), 0),
        ((7, 7, 256), 147_712),
        ((14, 14, 64), 18_496),
        ((7, 7, 64), 0),
        ((7, 7, 256), 147_712),
        ((7, 7, 512), 0),
        ((3, 3, 512), 0),
        ((4608,), 0),
        ((1000,), 4_609_000),
        ((500,), 500_500),
        ((10,), 5_010),
    ],
    "convnet": [
        ((26, 26, 32), 320),
        ((13, 13, 32), 0),
        ((11, 11, 64), 18_496),
        ((5, 5, 64), 0),
        ((3, 3, 64), 36_928),
        ((576,), 0),
        ((64,), 36_928),
        ((10,), 650),
    ],
    "double_conv_3x3": [
        ((26, 26, 32), 320),
        ((24, 24, 64), 18_496),
        ((12, 12, 64), 0),
        ((12, 12, 64), 0),
        ((9216,), 0),
        ((128,), 1_179_776),
        ((128,), 0),
        ((10,), 1_290),
    ],
    "double_conv_5x5": [
        ((24, 24, 32), 832),
        ((20, 20, 64), 51_264),
        ((10, 10, 64), 0),
        ((10, 10, 64), 0),
        ((6400,), 0),
        ((128,), 819_328),
        ((128,), 0),
        ((10,), 1_290),
    ],
    "single_conv_5x5": [
        ((24, 24, 32), 832),
        ((12, 12, 32), 0),
        ((12, 12, 32), 0),
        ((4608,), 0),
        ((128,), 589_952),
        ((128,), 0),
        ((10,), 1_290),
    ],
    "baseline": [
        ((24, 24, 32), 832),
        ((12, 12, 32), 0),
        ((12, 12, 32), 0),
        ((4608,), 0),
        ((128,), 589_952),
        ((10,), 1_290),
    ],
    "larger": [
        ((24, 24, 30), 780),
        ((12, 12, 30), 0),
        ((10, 10, 15), 4_065),
        ((5, 5, 15), 0),
        ((5, 5, 15), 0),
        ((375,), 0),
        ((128,), 48_128),
        ((50,), 6_450),
        ((10,), 510),
    ],
}
# Rates after the convolutions and after the hidden dense layers.
DROPOUT = {
    "double_conv_3x3": (0.25, 0.5),
    "double_conv_5x5": (0.25, 0.5),
    "single_conv_5x5": (0.25, 0.5),
    "baseline": (0.2, 0),
    "larger": (0.2, 0),
}


def reference_logits(name, params, x):
    """The tutorial's network by plain Linen layers, in Keras's order: conv, bias, ReLU, pool."""

    def conv(x, index, padding="VALID"):
        layer = params[f"Conv_{index}"]
        kernel = layer["kernel"]
        module = nn.Conv(kernel.shape[-1], kernel.shape[:2], padding=padding)
        return nn.relu(module.apply({"params": layer}, x))

    def pool(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    match name:
        case "branched":
            x = pool(conv(x, 0, "SAME"))
            left = conv(pool(conv(x, 1, "SAME")), 2, "SAME")
            right = conv(pool(conv(x, 3, "SAME")), 4, "SAME")
            x = pool(jnp.concatenate([left, right], -1))
        case "convnet":
            x = conv(pool(conv(pool(conv(x, 0)), 1)), 2)
        case "double_conv_3x3" | "double_conv_5x5":
            x = pool(conv(conv(x, 0), 1))
        case "single_conv_5x5" | "baseline":
            x = pool(conv(x, 0))
        case "larger":
            x = pool(conv(pool(conv(x, 0)), 1))
    x = x.reshape(len(x), -1)
    dense = [params[f"Dense_{i}"] for i in range(sum(key.startswith("Dense") for key in params))]
    for layer in dense[:-1]:
        x = nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ dense[-1]["kernel"] + dense[-1]["bias"][None]


def test_names():
    assert sorted(models.names()) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_layers_are_the_tutorials(name):
    rows = summary.rows(models.create(name))
    assert [(row.shape, row.parameters) for row in rows] == LAYERS[name]
    params = jax.eval_shape(models.create(name).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))[
        "params"
    ]
    assert count_parameters(params) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_logits_are_those_of_plain_linen_layers(name):
    model = models.create(name)
    params = random_variables(model)["params"]
    # As many as are computed in blocks.
    images = uniform(2, (32, 28, 28, 1))
    logits = quick_jit(model.apply)({"params": params}, images)
    assert logits.dtype == jnp.float32 and logits.shape == (32, 10)
    expected = quick_jit(partial(reference_logits, name))(params, images)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["double_conv_3x3", "double_conv_5x5"])
def test_training_makes_two_convolutions_in_one_loop(name):
    model = models.create(name, conv_dropout=0.0, dense_dropout=0.0)
    params = random_variables(model)["params"]
    images = uniform(2, (32, 28, 28, 1))
    train = partial(model.apply, train=True)
    assert "_in_one_loop" in str(jax.make_jaxpr(train)({"params": params}, images))
    expected = quick_jit(partial(reference_logits, name))(params, images)
    logits = quick_jit(train)({"params": params}, images)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_start_as_in_keras(name):
    init = quick_jit(models.create(name).init)
    params = init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    for layer in params.values():
        assert not layer["bias"].any()
        kernel = layer["kernel"]
        receptive = np.prod(kernel.shape[:-2], dtype=int)
        limit = np.sqrt(6 / (receptive * (kernel.shape[-2] + kernel.shape[-1])))
        assert np.abs(kernel).max() <= limit
        # A uniform distribution's deviation is its limit over the root of 3.
        tolerance = 3 / np.sqrt(kernel.size)
        assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=tolerance)
        assert abs(kernel.mean()) < tolerance * limit


@pytest.mark.parametrize("name", PARAMETERS)
def test_dropout_rates(name):
    found = []

    def note(next_call, args, kwargs, context):
        if isinstance(context.module, layers.Dropout):
            found.append((args[0].ndim, context.module.rate, args[1]))
        return next_call(*args, **kwargs)

    model = models.create(name)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    with nn.intercept_methods(note):
        jax.eval_shape(partial(model.init, train=True), rngs, jnp.zeros((1, 28, 28, 1)))
    after_convs, after_dense = DROPOUT.get(name, (0, 0))
    expected = [(4, after_convs, True), (2, after_dense, True)]
    assert found == [drop for drop in expected if drop[1]]


def test_dropout_acts_in_training_alone():
    name = "single_conv_5x5"
    model = models.create(name)
    params = random_variables(model)["params"]
    images = uniform(2, (4, 28, 28, 1))

    @partial(quick_jit, static_argnums=0)
    def logits(train, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, images, train=train, rngs=rngs)

    assert (logits(True, 0) != logits(True, 1)).any()
    np.testing.assert_array_equal(logits(False, 0), logits(False, 1))


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize(("shape", "classes"), [((32, 32, 3), 100), ((23, 40, 1), 2)])
def test_other_images_and_classes(name, shape, classes):
    model = models.create(name, num_classes=classes)
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, *shape)))
    assert out.shape == (2, classes)


@pytest.mark.parametrize("name", PARAMETERS)
def test_images_too_small_are_refused(name):
    model = models.create(name)
    with pytest.raises(UserError, match="images are too small for this network"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 5, 5, 1)))


def test_another_padding_is_refused():
    with pytest.raises(ValueError, match='padding is \'valid\': give "VALID" or "SAME"'):
        jax.eval_shape(
            layers.Conv(4, (3, 3), "valid").init, jax.random.key(0), jnp.zeros((1, 8, 8, 1))
        )


@pytest.mark.parametrize("name", models.names())
def test_no_images_have_no_logits(name):
    model = models.create(name)
    images = jnp.zeros((0, 28, 28, 1))
    assert jax.eval_shape(model.apply, random_variables(model), images).shape == (0, 10)


def test_parameters_are_float32_where_64_bits_are_the_default():
    with jax.enable_x64(True):
        image = jnp.zeros((1, 28, 28, 1), jnp.float32)
        params = jax.eval_shape(models.create("baseline").init, jax.random.key(0), image)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["larger", "branched"])
def test_bfloat16_keeps_parameters_and_logits_in_float32(name):
    model = models.create(name, dtype=jnp.bfloat16)
    params = random_variables(model)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    images = uniform(2, (5, 28, 28, 1))
    logits = quick_jit(model.apply)({"params": params}, images)
    assert logits.dtype == jnp.float32
    # Not made in bfloat16 and widened.
    assert (logits != logits.astype(jnp.bfloat16)).mean() > 0.9
    exact = quick_jit(models.create(name).apply)({"params": params}, images)
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
    # And every layer before them in bfloat16.
    _, seen = jax.eval_shape(
        lambda: model.apply(
            {"params": params}, images, capture_intermediates=True, mutable="intermediates"
        )
    )
    outputs = {
        layer: found["__call__"][0]
        for layer, found in seen["intermediates"].items()
        if layer != "__call__"
    }
    last = max(layer for layer in outputs if layer.startswith("Dense"))
    assert len(outputs) > 6 and {
        layer for layer, y in outputs.items() if y.dtype != jnp.bfloat16
    } == {last}


def test_an_unknown_network_is_refused():
    with pytest.raises(UserError, match="no network 'lager'; did you mean 'larger'"):
        models.create("lager")


def test_summary_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["summary", "larger"])
    summary.main()
    out = capsys.readouterr().out
    assert "Conv_1 (Conv)          (None, 10, 10, 15)       4,065\n" in out
    assert "Total parameters: 59,933 (0.23 MiB in float32)" in out


def test_summary_of_other_images_and_classes(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["summary", "larger", "--image-shape=32,32,3", "--classes=4"])
    summary.main()
    out = capsys.readouterr().out
    assert "input                  (None, 32, 32, 3)" in out
    assert re.search(r"Conv_0 \(Conv\) +\(None, 28, 28, 30\) +2,280\n", out)
    assert re.search(r"Dense_2 \(Dense\) +\(None, 4\) +204\n", out)


@pytest.mark.parametrize("shape", ["28,28", "a,b,c", "0,28,1"])
def test_summary_refuses_a_bad_shape(monkeypatch, shape):
    monkeypatch.setattr("sys.argv", ["summary", "larger", f"--image-shape={shape}"])
    with pytest.raises(UserError, match="--image-shape"):
        summary.main()


def test_the_dtype_of_a_run_is_that_of_its_network():
    config = config_lib.default()
    config.compute_dtype = "bfloat16"
    assert parts.create_model(config, 10).dtype == jnp.bfloat16


def test_a_call_that_nothing_compiles_is_compiled_once(caplog):
    model = models.create("double_conv_3x3")
    variables = random_variables(model)
    caplog.set_level("DEBUG", "jax._src.dispatch")

    def compiled(train):
        caplog.clear()
        with jax.log_compiles():
            rngs = {"dropout": jax.random.key(0)}
            model.apply(variables, jnp.zeros((16, 28, 28, 1)), train=train, rngs=rngs)
        return sum("Finished XLA compilation" in line for line in caplog.messages)

    for train in (False, True):
        assert compiled(train) > 0
        assert compiled(train) == 0


@pytest.mark.parametrize("name", models.names())
def test_a_network_is_exported_for_batches_of_any_size(name):
    model = models.create(name)
    variables = random_variables(model)
    apply = quick_jit(lambda images: model.apply(variables, images))
    shape = export.symbolic_shape("b, 28, 28, 1")
    exported = export.export(apply)(jax.ShapeDtypeStruct(shape, jnp.float32))
    for batch in (1, 16):
        images = uniform(batch, (batch, 28, 28, 1))
        actual = quick_jit(exported.call)(images)
        np.testing.assert_allclose(actual, apply(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["larger", "branched"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 28, 28), np.float32), r"\[B, H, W, C\], and here is \(2, 28, 28\)"),
        (np.zeros((2, 28, 28, 1), np.uint8), "here are uint8: scale them"),
    ],
)
def test_images_of_another_form_are_refused(name, images, message):
    model = models.create(name)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), images)


def test_intermediates_in_training_are_those_of_every_layer():
    model = models.create("double_conv_3x3")
    variables, images = random_variables(model), uniform(0, (2, 28, 28, 1))
    rngs = {"dropout": jax.random.key(0)}
    apply = partial(model.apply, train=True, rngs=rngs, capture_intermediates=True)
    _, captured = jax.eval_shape(apply, variables, images)
    assert {"Conv_0", "Conv_1", "Dense_0", "Dense_1"} <= captured["intermediates"].keys()


def test_interceptors_see_every_layer_in_training():
    model, called = models.create("double_conv_3x3"), []
    variables = random_variables(model)

    def note(next_call, args, kwargs, context):
        called.append((context.module.name, context.method_name))
        return next_call(*args, **kwargs)

    apply = partial(model.apply, train=True, rngs={"dropout": jax.random.key(0)})
    with nn.intercept_methods(note):
        jax.eval_shape(apply, variables, jnp.zeros((2, 28, 28, 1)))
    assert {("Conv_0", "__call__"), ("Conv_1", "__call__")} <= set(called)


def test_images_too_small_are_refused_in_training():
    model = models.create("double_conv_5x5")
    apply = partial(model.apply, train=True, rngs={"dropout": jax.random.key(0)})
    for size, message in ((8, "4×4 pixels reach a 5×5 convolution"), (9, "1×1 pixels reach a 2×2")):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(apply, random_variables(model), jnp.zeros((2, size, size, 1)))


def test_the_gradient_of_a_network_is_exported_for_batches_of_any_size():
    model = models.CNN(convs=((4, 3, True),), dense=(5,))
    variables = random_variables(model, (8, 8, 1))

    @quick_jit
    def gradient(variables, images):
        return jax.grad(lambda *operands: jnp.sum(model.apply(*operands) ** 2))(variables, images)

    shape = export.symbolic_shape("b, 8, 8, 1")
    exported = export.export(gradient)(variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    images = uniform(0, (3, 8, 8, 1))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        exported.call(variables, images),
        gradient(variables, images),
    )


def test_a_hessian_is_that_of_plain_linen_layers():
    model = models.CNN(convs=((8, 3, True),), dense=(), num_classes=3)
    params, images = random_variables(model, (6, 6, 8))["params"], uniform(0, (17, 6, 6, 8))

    def hessian(logits):
        def loss(bias):
            layer = params["Conv_0"] | {"bias": bias}
            return jnp.sum(logits(params | {"Conv_0": layer}, images) ** 3)

        return quick_jit(jax.jacrev(jax.grad(loss)))(params["Conv_0"]["bias"])

    def ours(params, images):
        return model.apply({"params": params}, images, train=True)

    expected = hessian(partial(reference_logits, "baseline"))
    np.testing.assert_allclose(hessian(ours), expected, atol=1e-5 * np.abs(expected).max())


def test_there_is_no_forward_mode():
    model = models.create("baseline")
    apply = partial(model.apply, random_variables(model))
    images = uniform(0, (2, 28, 28, 1))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(apply, (images,), (images,))
