"""The recipe that each network is measured with."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

ROOT = Path(__file__).parent.parent


def config(recipe: str) -> ConfigDict:
    """The configuration in `configs/<recipe>.py`; a network's own recipe has its name."""
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "configs" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
