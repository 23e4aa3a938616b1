from pathlib import Path

import jax
import pytest

from mnist_flax import environment


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    """The user's cache folder; JAX's setting is what it was again afterwards."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)


def test_what_is_compiled_is_kept_by_processor(cache_folder, monkeypatch):
    environment.keep_compiled()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.is_dir() and folder.parent == cache_folder / "mnist_flax"

    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(environment, "_instruction_sets", lambda: b"flags: other")
    environment.keep_compiled()
    assert Path(jax.config.jax_compilation_cache_dir) != folder


def test_a_folder_that_the_user_chose_is_taken(cache_folder, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    environment.keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not cache_folder.exists()


def test_nothing_is_kept_where_nothing_can_be_written(cache_folder):
    cache_folder.write_text("a file")
    environment.keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
