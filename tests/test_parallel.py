import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mnist_flax import batches, datasets, environment, loaders, parallel, parts, train
from mnist_flax import config as config_lib
from mnist_flax.errors import UserError
from tests import process

IMAGES = np.random.default_rng(0).integers(0, 256, (90, 28, 28, 1), np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, 90, np.int32)


def test_devices_together_train_and_score_as_one():
    config = config_lib.default()
    config.model, config.batch_size = "baseline", 40

    def run(count):
        config.parallel = count
        mesh = parallel.create_mesh(config)
        assert mesh.size == count
        data = loaders.Resident(datasets.Arrays(IMAGES, LABELS), mesh)
        splits = parts.Data(data, None, data, 10)
        model, tx = parts.create_model(config, 10), parts.create_optimizer(config, 90)
        state = parts.initial_state(config, model, tx, (28, 28, 1), mesh)
        programs = parts.compile_programs(config, model, tx, state, splits, mesh)
        rows = batches.train_batches(0, 0, 90, 40)
        (piece,) = data.pieces(rows[:, None], 3)
        state, metrics = programs.train(state, piece)
        score = programs.score_test({"params": state.params, "batch_stats": {}})
        assert (int(metrics.count), score["count"]) == (90, 90)
        assert all(
            leaf.sharding.device_set == set(mesh.devices.flat) for leaf in jax.tree.leaves(state)
        )
        return jax.device_get((state.params, metrics.loss_sum)), score

    (alone, alone_score), (together, score) = run(1), run(3)
    # Adam turns rounding of gradients near 0 into steps of the learning rate's size.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), alone, together)
    assert score["loss"] == pytest.approx(alone_score["loss"], rel=1e-4)


def test_a_containers_share_of_the_cores_is_said_to_xla(monkeypatch):
    # As a variable that is deleted and set by what is tested is deleted again afterwards.
    monkeypatch.setenv("NPROC", "")
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr(environment, "processors", lambda: 64)
    monkeypatch.setattr(environment, "cores", lambda: 64)
    parallel.limit_threads()
    assert "NPROC" not in os.environ
    monkeypatch.setattr(environment, "cores", lambda: 2)
    parallel.limit_threads()
    assert os.environ["NPROC"] == "2"


def test_a_plugin_without_its_device_is_said(monkeypatch, recwarn):
    parallel.create_mesh(config_lib.default())
    assert not [w for w in recwarn if w.category is UserWarning]
    # As where JAX may choose, and there is a plugin for a GPU.
    monkeypatch.setattr(parallel, "_cpu_only", lambda: False)
    with pytest.warns(UserWarning, match="could not use one: this runs on CPU"):
        parallel.create_mesh(config_lib.default())


@pytest.mark.parametrize(
    ("platforms", "cpu"), [("cpu", True), ("cpu,cuda", True), ("cuda,cpu", False)]
)
def test_the_first_platform_named_is_the_one_that_trains(monkeypatch, platforms, cpu):
    config = SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr(parallel, "jax", SimpleNamespace(config=config))
    assert parallel._cpu_only() == cpu


# The other is what JAX raises for "cuda" where there is no GPU.
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Unknown backend: 'gpu' requested\nbut no platforms."), ".*'gpu' requested"),
        (AssertionError(), "none of the kind asked for is here"),
    ],
)
def test_a_kind_of_device_that_is_not_there_is_said(monkeypatch, error, reason):
    def none(*args):
        raise error

    monkeypatch.setattr(jax, "devices", none)
    for asked in (lambda: parallel.create_mesh(config_lib.default()), parallel.single_mesh):
        with pytest.raises(UserError, match=rf"no device .*\({reason}\): unset JAX_PLATFORMS"):
            asked()


def test_more_devices_than_there_are_are_refused():
    config = config_lib.default()
    config.parallel = 5
    with pytest.raises(UserError, match="parallel=5 asks for more devices than there are: 4"):
        parallel.create_mesh(config)


def devices_of_a_new_process(**values):
    lines = ["import jax", "from mnist_flax import config, parallel", "c = config.default()"]
    lines += [f"c.{key} = {value}" for key, value in values.items()]
    lines += ["print(parallel.create_mesh(c).size, jax.device_count())"]
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    return [int(n) for n in result.stdout.split()]


def test_two_processes_train_as_one_and_each_reads_its_share_of_a_stream(tmp_path):
    config = config_lib.recipe("run", "digits", model="baseline", data__train_split="train[:90]")
    config.epochs = 1
    train.train_and_evaluate(config, tmp_path / "run")
    alone = [process.train_on_two_devices(name) for name in loaders.NAMES]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command, run = [sys.executable, "-m", "tests.process", str(port), "2"], str(tmp_path / "run")
    pipe = {"stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, str(index), run], **pipe) for index in range(2)]
    try:
        outputs = [each.communicate(timeout=300)[0] for each in running]
    finally:
        # Where one has failed the other waits for it.
        for each in running:
            each.kill()
    assert [each.returncode for each in running] == [0, 0]
    first, second = (re.findall(r"^trained (.*) (.*) (.*)$", o, re.MULTILINE) for o in outputs)

    assert alone[0][0] == alone[1][0]
    assert len({crc32 for crc32, _, _ in first + second}) == 1
    # Between one process and two, sums are rounded in another order.
    assert float(first[0][1]) == pytest.approx(alone[0][1], rel=1e-6)
    # The resident form reads no single examples. Of the batches of 35, 35 and 20 the second has 17,
    # 17 and 2, and one example more in the place of padding.
    assert [count for _, _, count in alone] == [0, 90]
    assert [count for _, _, count in first] == ["0", "54"]
    assert [count for _, _, count in second] == ["0", "37"]

    # Both processes have the figures of both seeds, and either can score a run by itself.
    def said(line, output):
        (found,) = re.findall(f"^{line} (.*)$", output, re.MULTILINE)
        return [*map(float, found.split())]

    expected = pytest.approx(process.train_two_seeds_on_two_devices(), rel=1e-5)
    assert [said("seeds", output) for output in outputs] == [expected] * 2
    assert said("run", outputs[1]) == pytest.approx(process.score_run(run), rel=1e-5)
    assert re.findall("^mesh (.*)$", outputs[0], re.MULTILINE) == ["1"]
    assert "\nmesh parallel=1 leaves process 1 of 2 without a device: set parallel=2" in outputs[1]


def test_a_number_of_devices_that_was_set_stands(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert devices_of_a_new_process(batch_size=500, parallel=3) == [3, 3]
    assert devices_of_a_new_process(batch_size=500, parallel=1) == [1, 3]


@pytest.mark.skipif(environment.cores() < 2, reason="this machine has one core")
def test_cores_are_devices_where_the_batch_is_large_enough():
    cores = environment.cores()
    assert devices_of_a_new_process(batch_size=16 * cores + 15) == [cores, cores]
    assert devices_of_a_new_process(batch_size=31) == [1, 1]
    assert devices_of_a_new_process(batch_size=500, parallel=1) == [1, 1]
    assert devices_of_a_new_process(batch_size=8, num_seeds=cores) == [cores, cores]
    with pytest.raises(subprocess.CalledProcessError) as error:
        devices_of_a_new_process(parallel=10 * cores)
    assert f"asks for more devices than there are: {cores}" in error.value.stderr


def test_of_several_gpus_one_trains_unless_more_are_asked_for(monkeypatch):
    gpus = [SimpleNamespace(platform="gpu", process_index=0) for _ in range(4)]

    def meshed(devices, shape):
        return SimpleNamespace(shape=shape, local_devices=devices)

    monkeypatch.setattr(parallel, "devices", lambda: gpus)
    monkeypatch.setattr(parallel, "_mesh", meshed)
    monkeypatch.setattr(environment, "device_name", lambda: "a GPU")
    config = config_lib.default()
    assert parallel.create_mesh(config).shape == (1, 1)
    config.num_seeds = 2
    assert parallel.create_mesh(config).shape == (1, 1)
    config.parallel = 4
    assert parallel.create_mesh(config).shape == (2, 2)


@pytest.mark.parametrize("seeds_at_once", [1, 4])
def test_seeds_of_a_gpu_must_fit_into_its_memory(seeds_at_once, monkeypatch):
    config = config_lib.default()
    config.model, config.num_seeds, config.parallel = "baseline", 8, seeds_at_once
    mesh = parallel.create_mesh(config)
    model, tx = parts.create_model(config, 10), parts.create_optimizer(config, 90)
    state = parts.abstract_state(config, model, tx, (28, 28, 1), mesh)
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # Weights and two moments, and a few numbers more.
    assert needed == pytest.approx(8 * 3 * 4 * 592_074, rel=1e-3)
    for lacking in (0, 1):
        free = (1, needed // seeds_at_once - lacking)
        monkeypatch.setattr(environment, "free_memory", lambda free=free: free)
        if not lacking:
            parts.abstract_state(config, model, tx, (28, 28, 1), mesh)
            continue
        with pytest.raises(UserError, match="8 seeds need 0.1 GiB .* are free: set a lower num_s"):
            parts.abstract_state(config, model, tx, (28, 28, 1), mesh)
