"""The tests: JAX runs on CPU, and it and git as by default, whatever the environment says."""

import os

# Before JAX is imported, and for the processes that tests start.
for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_", "GIT_"))]:
    del os.environ[name]
os.environ["JAX_PLATFORMS"] = "cpu"
