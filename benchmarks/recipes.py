"""The recipe that each network is measured with, and what the network consists of."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from mnist_flax import models

ROOT = Path(__file__).parent.parent


def config(recipe: str) -> ConfigDict:
    """The configuration in `configs/<recipe>.py`; a network's own recipe has its name."""
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "configs" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def spec_of(network: str) -> dict | None:
    """What a stack consists of, `None` for `branched`; the attributes of `models.CNN`."""
    model = models.create(network)
    if not isinstance(model, models.CNN):
        return None
    return {key: getattr(model, key) for key in ("convs", "dense", "conv_dropout", "dense_dropout")}
