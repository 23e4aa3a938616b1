import os
from pathlib import Path
from types import SimpleNamespace

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


def test_without_a_cache_folder_it_is_that_of_the_home_if_there_is_one(
    cache_folder, monkeypatch, tmp_path
):
    # A relative one does not count.
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "expanduser", lambda path: path)
        environment.keep_compiled()
        assert jax.config.jax_compilation_cache_dir is None
        assert not list(tmp_path.iterdir())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    environment.keep_compiled()
    assert jax.config.jax_compilation_cache_dir.startswith(f"{tmp_path}/home/.cache/mnist_flax/")


def test_nothing_is_kept_where_nothing_can_be_written(cache_folder):
    cache_folder.write_text("a file")
    environment.keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_container_has_its_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert environment.cores() == 8
    for text, cores in [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)]:
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert environment.cores() == cores


def test_limits_of_the_groups_above_count(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    monkeypatch.setattr(environment, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "own").write_text("1:name=systemd:/elsewhere\n0::/slurm/job_1/step_0\n")
    (tmp_path / "slurm/job_1/step_0").mkdir(parents=True)
    (tmp_path / "slurm/job_1/step_0/cpu.max").write_text("max 100000\n")
    (tmp_path / "slurm/job_1/cpu.max").write_text("300000 100000\n")
    (tmp_path / "slurm/cpu.max").write_text("600000 100000\n")
    assert environment.cores() == 3
    for kind, text in (("max", "1000000"), ("current", "900000"), ("stat", "inactive_file 0")):
        (tmp_path / f"slurm/job_1/memory.{kind}").write_text(f"{text}\n")
    assert environment.free_memory()[0] == 100_000
    # Of a namespace that does not reach up to there.
    (tmp_path / "own").write_text("0::/../other\n")
    assert environment.cores() == 8


def test_the_device_is_said_with_what_of_it_trains(monkeypatch):
    monkeypatch.setattr(environment, "cores", lambda: 16)
    monkeypatch.setattr(environment, "cpu_name", lambda: "A CPU")
    # One device has all cores.
    assert environment.device_name() == "cpu (16 cores of A CPU)"
    assert environment.device_name(12) == "cpu (12 of 16 cores of A CPU)"
    assert environment.device_name(16) == "cpu (16 cores of A CPU)"
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(jax, "devices", lambda: [gpu] * 8)
    assert environment.device_name() == "NVIDIA H200"
    assert environment.device_name(8) == "8 × NVIDIA H200"


def test_a_container_has_what_its_limit_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    # Files that were read count as used.
    (tmp_path / "memory.stat").write_text("anon 200000\ninactive_file 500000\nactive_file 100000\n")
    assert environment.free_memory()[0] == 700_000
    (tmp_path / "memory.max").write_text("max\n")
    assert environment.free_memory()[0] > 1_000_000


def test_a_cache_folder_that_cannot_be_written_is_left_alone(cache_folder, monkeypatch):
    # Not chmod, as root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    environment.keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_device_with_a_memory_of_its_own_has_what_is_not_in_use(monkeypatch):
    def device(stats):
        return [SimpleNamespace(memory_stats=lambda: stats)]

    monkeypatch.setattr(
        jax, "local_devices", lambda: device({"bytes_limit": 90, "bytes_in_use": 20})
    )
    assert environment.free_memory()[1] == 70
    # One that has no memory of its own, or does not tell.
    for stats in (None, {"bytes_in_use": 20}):
        monkeypatch.setattr(jax, "local_devices", lambda stats=stats: device(stats))
        assert environment.free_memory()[1] is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AMD EPYC", "AMD EPYC family 25 model 17"),
        ("AMD EPYC 9654 96-Core Processor", "AMD EPYC 9654 96-Core Processor"),
    ],
)
def test_a_processor_whose_name_has_no_number_is_told_by_its_model(
    name, expected, tmp_path, monkeypatch
):
    lines = ("processor\t: 0", "cpu family\t: 25", "model\t\t: 17", f"model name\t: {name}")
    (tmp_path / "cpuinfo").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "cpuinfo")
    assert environment.cpu_name() == expected
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "nothing")
    assert environment.cpu_name()
