import importlib.util
from pathlib import Path

import pytest

from mnist_flax import config as config_lib
from mnist_flax.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"

# name: (network, optimiser, batch, epochs, trained on, watched, seed)
RECIPES = {
    "branched": ("branched", "adam", 8, 12, "train[:90%]", "train[90%:]", 0),
    "convnet": ("convnet", "rmsprop", 64, 8, "train", "", 0),
    "convnet_5_epochs": ("convnet", "rmsprop", 64, 5, "train", "", 0),
    "double_conv_3x3": ("double_conv_3x3", "adam", 500, 20, "train[5000:]", "test", 42),
    "double_conv_5x5": ("double_conv_5x5", "adam", 500, 20, "train[5000:]", "test", 42),
    "single_conv_5x5": ("single_conv_5x5", "adam", 500, 20, "train[5000:]", "test", 42),
    "baseline": ("baseline", "adam", 200, 10, "train", "test", 7),
    "larger": ("larger", "adam", 200, 10, "train", "test", 7),
}


def get_config(recipe, *dataset):
    spec = importlib.util.spec_from_file_location(recipe, CONFIGS / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*dataset)


def test_there_is_a_file_for_each_recipe():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_the_tutorials(recipe):
    config = get_config(recipe)
    data = config.data
    assert RECIPES[recipe] == (
        config.model,
        config.optimizer,
        config.batch_size,
        config.epochs,
        data.train_split,
        data.watch_split,
        config.seed,
    )
    assert (config.name, data.name, data.test_split) == (recipe, "mnist", "test")
    assert (config.learning_rate, config.schedule) == (1e-3, "constant")
    config_lib.validate(config)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_take_the_embedded_digits(recipe):
    config = get_config(recipe, "digits")
    assert (config.name, config.data.name) == (f"{recipe}-digits", "digits")
    assert config.batch_size <= 32 and config.epochs >= 20
    config_lib.validate(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 0, "batch_size=0 must be at least 1"),
        ("epochs", -1, "epochs=-1 must be at least 1"),
        ("seed", -1, "seed=-1 must be 0 or more"),
        ("seed", 2**32, "below 2**32"),
        ("num_seeds", 0, "num_seeds=0 must be at least 1"),
        ("parallel", -1, "parallel=-1 must be 0 or more"),
        ("data.loader", "streem", "there is no data.loader 'streem'; did you mean 'stream'?"),
        ("checkpoint.every_steps", -5, "checkpoint.every_steps=-5 must be 0 or more"),
        ("learning_rate", 0.0, "learning_rate=0.0 must be a number above 0 in float32"),
        ("learning_rate", float("nan"), "learning_rate=nan must be a number above 0 in float32"),
        ("learning_rate", float("inf"), "learning_rate=inf must be a number above 0 in float32"),
        ("learning_rate", 1e-46, "learning_rate=1e-46 must be a number above 0 in float32"),
        ("learning_rate", 1e39, "must be a number above 0 in float32"),
        ("model", "lager", "there is no model 'lager'; did you mean 'larger'?"),
        ("optimizer", "rmsporp", "there is no optimizer 'rmsporp'; did you mean 'rmsprop'?"),
        ("schedule", "cosin", "there is no schedule 'cosin'; did you mean 'cosine'?"),
        ("compute_dtype", "float16", "there is no compute_dtype 'float16'"),
        ("data.name", "mnits", "data.name: there is no data set 'mnits': did you mean 'mnist'?"),
        ("data.train_split", "train[200%:]", "data.train_split: the split 'train[200%:]'"),
        ("data.train_split", "", "data.train_split: the split ''"),
        ("data.test_split", "tset", "data.test_split: the split 'tset'"),
        ("data.test_split", "tset", "the nearest is 'test'"),
        ("data.watch_split", "train[60000:]", "data.watch_split: the split"),
    ],
)
def test_impossible_values_are_refused(key, value, message):
    config = config_lib.default()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        config_lib.validate(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [("batch_size", "20", "whole number"), ("batch_size", 1.5, "whole number")]
    + [("seed", True, "whole number"), ("learning_rate", "fast", "a number"), ("model", 3, "text")],
)
def test_wrong_types_are_refused(key, value, kind):
    config = config_lib.default()
    with config.ignore_type():
        config[key] = value
    with pytest.raises(UserError, match=f"{key}={value!r} must be .*{kind}"):
        config_lib.validate(config)


def test_a_whole_number_will_do_for_a_learning_rate():
    config = config_lib.default()
    with config.ignore_type():
        config.learning_rate = 1
    config_lib.validate(config)


def test_unknown_and_missing_keys_are_refused():
    config = config_lib.default()
    config.bach_size = 3
    with pytest.raises(UserError, match="no configuration key 'bach_size'; did you mean 'batch_s"):
        config_lib.validate(config)
    config = config_lib.default()
    del config.data["watch_split"]
    with pytest.raises(UserError, match="'data.watch_split' is missing"):
        config_lib.validate(config)


def test_an_unknown_override_of_a_recipe_fails():
    with pytest.raises(UserError, match="'data.trainsplit'; did you mean 'data.train_split'"):
        config_lib.recipe("x", "mnist", data__trainsplit="train")


def test_a_run_is_called_after_recipe_and_data_set():
    assert config_lib.recipe("larger", "mnist").name == "larger"
    # A folder may be called after it.
    assert config_lib.recipe("larger", "emnist/letters").name == "larger-emnist-letters"
