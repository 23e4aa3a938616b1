import importlib
import json
import re
import shutil
import subprocess
import sys
from datetime import date
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    hardware,
    input_pipeline,
    kernels,
    limits,
    recipes,
    reproduce,
    scaling,
    seeds,
    startup,
    suite,
    throughput,
)
from mnist_flax import datasets, environment, models, state
from mnist_flax.errors import UserError


def spec_of(network):
    """The specification as the workers read it from job.json."""
    return json.loads(json.dumps(recipes.spec_of(network)))


def parameters_of(network):
    image = jnp.zeros((1, 28, 28, 1))
    return state.count_parameters(
        jax.eval_shape(models.create(network).init, jax.random.key(0), image)
    )


@pytest.mark.parametrize("network", models.names())
def test_the_flax_loop_has_the_same_network(network):
    from benchmarks.peers import flax_loop

    model = flax_loop.network(spec_of(network))
    image = jnp.zeros((1, 28, 28, 1))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    assert state.count_parameters(shapes) == parameters_of(network)


@pytest.mark.parametrize("network", models.names())
def test_keras_has_the_same_network(network):
    pytest.importorskip("keras", reason="keras is not installed")
    pytest.importorskip("tensorflow", reason="tensorflow is not installed")
    from benchmarks.peers import keras_fit

    assert keras_fit.network(spec_of(network)).count_params() == parameters_of(network)


@pytest.mark.parametrize("network", models.names())
def test_torch_has_the_same_network(network):
    pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks.peers import torch_loop

    model = torch_loop.network(spec_of(network))
    assert sum(p.numel() for p in model.parameters()) == parameters_of(network)


def report(*speeds, parameters=10, loss_after=0.5):
    return {
        "parameters": parameters,
        "first_step_seconds": 4.0,
        "compile_seconds": 3.0,
        "loss_after": loss_after,
        "peak_memory_mib": 600.0,
        "device_memory_mib": None,
        "images_per_second": list(speeds),
    }


def result(**peers):
    return {
        "batch_size": 100,
        "hardware": "a machine",
        "versions": {"jax": "1", "torch": None},
        "peers": peers,
    }


def test_the_table_compares_medians_with_the_best_peer():
    results = {
        "larger": result(mnist_flax=report(100, 900, 800), **{"keras-tf": report(400, 1, 700)}),
        "convnet": result(mnist_flax=report(300), torch=report(200), **{"keras-tf": report(150)}),
    }
    text = throughput.table(results)
    costs = "4.0 s | 3.0 s | 600 MiB |"
    first = "| `larger` (100) | 800 (100 to 900) | 8.0 | keras-tf, 400 | **2.00** | " + costs
    assert first in text
    assert "| `convnet` (100) | 300 (300 to 300) | 3.0 | torch, 200 | **1.50** |" in text
    assert "Geometric mean of the ratios: 1.73." in text  # √(2 · 1.5)
    assert "| `convnet` | keras-tf | 150 (150 to 150) | 2.00 | " + costs in text
    of_one_start = "seconds and memory those of one start; a machine; jax 1."
    # Networks that were measured under other conditions are told apart.
    assert "`larger`: Speeds are medians of 3 turns beside keras-tf, " + of_one_start in text
    assert (
        "`convnet`: Speeds are medians of 1 turns beside torch, keras-tf, " + of_one_start in text
    )


def test_another_network_or_one_that_does_not_learn_is_no_result():
    throughput.check("torch", report(1), ours=report(1))
    with pytest.raises(UserError, match="torch trained another network: 11"):
        throughput.check("torch", report(1, parameters=11), ours=report(1))
    for loss in (2.2, float("nan")):
        with pytest.raises(UserError, match="torch did not learn"):
            throughput.check("torch", report(1, loss_after=loss), ours=report(1))


def test_a_missing_package_is_named_before_anything_runs(monkeypatch, tmp_path):
    def installed(package):
        return None if package == "torch" else "1"

    monkeypatch.setattr(environment, "version_of", installed)
    with pytest.raises(UserError, match=r"torch needs torch.*pip install '\.\[bench\]'"):
        throughput.main(["--peers", "torch", f"--results={tmp_path / 'results'}"])
    assert not (tmp_path / "results").exists()
    # Where none is named, those that can run do.
    measured = []

    def measure(network, peers, args):
        measured.extend(peers)
        return {"mnist_flax": report(1)}

    monkeypatch.setattr(throughput, "measure", measure)
    with pytest.raises(SystemExit, match="not measured, as said above: flax-loop of larger"):
        throughput.main(["--networks", "larger", f"--results={tmp_path / 'results'}"])
    assert "keras-tf" in measured and not any(peer.startswith("torch") for peer in measured)


def test_ours_beside_the_flax_loop_from_the_command_line(tmp_path, monkeypatch):
    datasets.load("digits", "train")
    monkeypatch.setitem(throughput.PEERS, "broken", throughput.PeerSpec("broken"))
    arguments = "--networks baseline --peers broken flax-loop --dataset digits --repetitions 2"
    with pytest.raises(SystemExit, match="not measured, as said above: broken of baseline"):
        throughput.main([*arguments.split(), "--seconds=0.5", f"--results={tmp_path}"])
    # Not among those of MNIST.
    results = json.loads((tmp_path / "throughput_cpu_digits.json").read_text())
    assert list(results) == ["baseline"]
    assert list(results["baseline"]["peers"]) == ["mnist_flax", "flax-loop"]
    for peer in ("mnist_flax", "flax-loop"):
        measured = results["baseline"]["peers"][peer]
        assert measured["parameters"] == 592074
        assert len(measured["images_per_second"]) == 2
        assert measured["loss_after"] < 0.8 * np.log(10)
        assert 0 < measured["compile_seconds"] < measured["first_step_seconds"]
    assert (tmp_path / "throughput_cpu_digits.md").read_text() == throughput.table(results)
    assert (tmp_path / "throughput_cpu_digits.png").stat().st_size > 10_000


def test_a_start_from_the_command_line(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    arguments = "--network baseline --dataset digits --scripts mnist_flax --repetitions 1"
    startup.main([*arguments.split(), f"--results={tmp_path}"])
    result = json.loads((tmp_path / "startup_cpu_digits.json").read_text())
    assert (result["network"], list(result["runs"])) == ("baseline", ["mnist_flax"])
    (run,) = result["runs"]["mnist_flax"]
    assert 0 < run["first_step"] < run["whole_process"]
    assert run["peak_memory_mib"] > 200
    assert (tmp_path / "startup_cpu_digits.md").read_text() == startup.table(result)


def test_several_seeds_from_the_command_line(tmp_path):
    arguments = "--networks baseline --seeds 2 --repetitions 1 --seconds 0.1"
    seeds.main([*arguments.split(), f"--results={tmp_path}"])
    result = json.loads((tmp_path / "seeds_cpu.json").read_text())
    speeds = result["images_per_second"]["baseline"]
    assert list(speeds) == ["2"] and len(speeds["2"]) == 1
    assert min(speeds["2"]) > 0
    assert (tmp_path / "seeds_cpu.md").read_text() == seeds.table(result)


def test_scaling_along_each_axis(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    def run(network, device, seconds, point):
        assert (network, device, seconds) == ("convnet", "cpu", 0.5)
        speed = 1000 * point["width"] + point["batch_size"] + point["examples"] / 60_000
        return {"images_per_second": speed, "peak_memory_mib": 300.0}

    monkeypatch.setattr(scaling, "run", run)
    monkeypatch.setattr(
        scaling, "AXES", {"batch_size": (8, 32), "examples": (6_000,), "width": (2,)}
    )
    scaling.main(["--repetitions=2", "--seconds=0.5", f"--results={tmp_path}"])
    result = json.loads((tmp_path / "scaling_cpu.json").read_text())
    assert result["usual"] == {"batch_size": 64, "examples": 60_000, "width": 1}
    text = (tmp_path / "scaling_cpu.md").read_text()
    assert "| batch size | 32 | 1,033 (1,033 to 1,033) | 300 MiB |" in text
    assert "| width | 2 | 2,065 (2,065 to 2,065) | 300 MiB |" in text
    assert (tmp_path / "scaling_cpu.png").stat().st_size > 10_000


def test_each_way_of_bringing_images_from_the_command_line(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    datasets.load("digits", "train")
    arguments = "--network baseline --dataset digits --repetitions 1"
    input_pipeline.main([*arguments.split(), f"--results={tmp_path}"])
    result = json.loads((tmp_path / "input_pipeline_cpu_digits.json").read_text())
    speeds = result["images_per_second"]
    assert list(speeds) == ["tfds", "grain", "train, stream", "train, resident"]
    assert all(speed > 0 for (speed,) in speeds.values())
    text = (tmp_path / "input_pipeline_cpu_digits.md").read_text()
    assert text == input_pipeline.table(result)
    assert "`baseline`, digits (train); medians of 1 runs" in text


def test_a_result_says_which_commit_gave_it(tmp_path, monkeypatch):
    if not shutil.which("git"):
        pytest.skip("git is not installed")

    def git(*arguments):
        command = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=x",
            "-c",
            "user.email=x",
            *arguments,
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    assert hardware.commit() is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-qm", "first")
    head = git("rev-parse", "--short", "HEAD")
    assert hardware.origin("cpu", ["numpy", "no-such-package"]) == {
        "measured": date.today().isoformat(),
        "commit": head,
        "hardware": hardware.describe("cpu"),
        "versions": environment.versions() | {"no-such-package": None},
    }
    (tmp_path / "code.py").write_text("2")
    assert hardware.commit() == f"{head}-dirty"


@pytest.mark.parametrize(
    "file",
    sorted(suite.FOLDER.rglob("*.json")),
    ids=lambda file: str(file.relative_to(suite.FOLDER)),
)
def test_a_committed_table_is_that_of_the_committed_figures(file):
    module = importlib.import_module(f"benchmarks.{re.match('(.+)_(cpu|gpu)', file.stem)[1]}")
    assert file.with_suffix(".md").read_text() == module.table(json.loads(file.read_text()))


def test_a_peer_that_dies_is_left_out_and_a_signal_ends_all(monkeypatch):
    ready, turn, last = (json.dumps(part) for part in (report(1), {"images_per_second": 2}, {}))
    lives = f"print('{ready}'); [print('{turn}', flush=True) for _ in sys.stdin]; print('{last}')"
    dies = f"print('{ready}')"

    def start(peer, folder, device):
        code = f"import sys; sys.stdout.reconfigure(line_buffering=True); {peers[peer]}"
        (folder / f"{peer}.log").touch()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
        if peers[peer] == dies:
            process.wait()
        return process

    peers = {"mnist_flax": lives, "torch": dies}
    args = SimpleNamespace(device="cpu", repetitions=2, seconds=1)
    monkeypatch.setattr(throughput, "start", start)
    monkeypatch.setattr(throughput, "write_job", lambda *_: None)
    measured = throughput.measure("larger", list(peers), args)
    assert list(measured) == ["mnist_flax"]
    assert measured["mnist_flax"]["images_per_second"] == [2, 2]

    # As SIGTERM does, which is no fault of the peer's.
    def stopped(worker, peer, folder):
        if peer == "torch":
            raise SystemExit(143)
        return report(1)

    monkeypatch.setattr(throughput, "receive", stopped)
    with pytest.raises(SystemExit):
        throughput.measure("larger", list(peers), args)


def test_what_ends_reproduce_ends_what_it_runs(monkeypatch):
    class Run:
        def __init__(self):
            self.calls = []

        def wait(self):
            self.calls.append("wait")
            if stop and self.calls == ["wait"]:
                raise stop
            return 0

        def terminate(self):
            self.calls.append("terminate")

    stop = None
    assert reproduce.finish([Run(), Run()]) == [0, 0]
    for stop, calls in (
        (SystemExit(143), ["wait", "terminate", "wait"]),
        (KeyboardInterrupt(), ["wait", "wait"]),
    ):
        run = Run()
        with pytest.raises(type(stop)):
            reproduce.finish([run])
        assert run.calls == calls


def test_the_table_of_accuracies():
    def run(accuracy, by="mnist_flax"):
        # What is not installed, or has another name, such as tensorflow-cpu, has no version.
        versions = {"keras": "3", "tensorflow": None} if by == "keras" else {"jax": "1"}
        facts = {"device": "cpu (2 cores)", "versions": versions, "minutes": 1.5}
        return {"by": by, "test_accuracy": accuracy} | facts

    results = {"larger": [run(0.99), run(0.992), run(0.9895, "keras")], "convnet": []}
    text = reproduce.table(results)
    assert (
        "| `larger` | 99.03 % | 99.10 ± 0.14 % | 99.00 | 99.20 | 2 | 98.95 % (1) | 1.5, 1.5 |\n"
        in text
    )
    assert "convnet" not in text
    assert "cpu (2 cores); jax 1, keras 3.\n" in text
    old = run(0.98) | {"device": "cpu (8 cores)", "versions": {"jax": "0"}}
    assert "cpu (8 cores), cpu (2 cores); jax 0 and 1.\n" in reproduce.table(
        {"larger": [old, run(0.99)]}
    )
    elsewhere = run(0.99) | {"device": "cpu (8 cores)", "minutes": 4.5}
    text = reproduce.table({"larger": [elsewhere] * 3 + [run(0.99), run(0.99, "keras")]})
    assert "| 1.5, 1.5 |\n" in text
    assert text.endswith("Minutes: `larger` on cpu (2 cores).\n")
    text = reproduce.table({"convnet": [run(0.98, "keras")]})
    assert "| `convnet` | 99.22 % | – | – | – | 0 | 98.00 % (1) | –, 1.5 |\n" in text


def test_only_seeds_that_are_left_are_trained_in_groups(tmp_path, monkeypatch):
    trained = []

    def finish(recipe, first, count, dtype, runs, env):
        trained.append((recipe, first, count))
        assert env["JAX_PLATFORMS"] == ("cuda" if "gpu" in runs.name else "cpu")
        folder = runs / f"{recipe}-seeds{first}-{first + count - 1}"
        folder.mkdir(parents=True)
        facts = {"device": "cpu (2 cores)", "versions": {"jax": "1"}, "wall_seconds": 120}
        seeds = [
            {"seed": seed, "test_loss": 0.1, "test_accuracy": 0.99 + seed / 1000}
            for seed in range(first, first + count)
        ]
        own = {"seeds": seeds} if count > 1 else seeds[0]
        (folder / "summary.json").write_text(json.dumps(facts | own))

    def reproduce_larger(*flags, runs="runs", together=("--together=2",)):
        trained.clear()
        flags += ("--recipes=larger", f"--runs={tmp_path / runs}", f"--results={tmp_path}")
        reproduce.main([*flags, *together])
        return trained

    def results(kind="cpu"):
        return json.loads((tmp_path / f"reproduce_{kind}.json").read_text())["larger"]

    monkeypatch.setattr(environment, "version_of", lambda package: "3")
    monkeypatch.setattr(reproduce, "train", finish)
    monkeypatch.setattr(reproduce, "train_in_keras", lambda _, seeds, *rest: trained.append(seeds))
    assert reproduce_larger("--seeds=3") == [("larger", 0, 2), ("larger", 2, 1)]
    assert reproduce_larger("--seeds=6") == [("larger", 3, 2), ("larger", 5, 1)]
    assert reproduce_larger("--seeds=3", "--keras") == [[0, 1], [2]]
    assert [run["seed"] for run in results()] == list(range(6))
    assert [run["minutes"] for run in results()] == [1, 1, 2, 1, 1, 2]
    assert "99.25 ± 0.19 % | 99.00 | 99.50 | 6 |" in (tmp_path / "reproduce_cpu.md").read_text()
    # Without their run folders: results are kept, and with --add not made again.
    assert reproduce_larger("--seeds=8", "--add", runs="new") == [("larger", 6, 2)]
    assert reproduce_larger("--seeds=1", runs="newer") == [("larger", 0, 1)]
    assert [run["seed"] for run in results()] == list(range(8))
    assert [run["minutes"] for run in results()] == [2, 1, 2, 1, 1, 2, 1, 1]
    # Of Keras, in which a seed does not say everything, every run is another one.
    before = results()
    again = {"by": "keras", "seed": 3, "minutes": 1.5}
    twice = reproduce.merged(
        {"larger": [*before, *({**before[0], **again, "test_loss": loss} for loss in (0.1, 0.2))]},
        tmp_path / "nothing",
        busy=False,
    )
    assert [run["test_loss"] for run in twice["larger"][:2]] == [0.1, 0.2]
    assert len(twice["larger"]) == len(before) + 2
    # On a busy machine what was timed before keeps its minutes.
    assert reproduce_larger("--seeds=9", "--add", "--busy") == [("larger", 8, 1)]
    assert [run["minutes"] for run in results()] == [2, 1, 2, 1, 1, 2, 1, 1, None]
    # In bfloat16 and on a GPU they are runs of their own.
    assert reproduce_larger("--seeds=1", "--dtype=bfloat16") == [("larger", 0, 1)]
    assert reproduce_larger("--seeds=1", "--device=gpu") == [("larger", 0, 1)]
    for kind in ("cpu_bfloat16", "gpu"):
        assert [run["seed"] for run in results(kind)] == [0]
    # On a GPU ten seeds at once, but in Keras, where each is a process.
    assert reproduce_larger("--seeds=13", "--device=gpu", together=()) == [
        ("larger", 1, 10),
        ("larger", 11, 2),
    ]
    in_keras = reproduce_larger("--seeds=4", "--device=gpu", "--keras", together=())
    assert in_keras == [[0], [1], [2], [3]]
    with pytest.raises(UserError, match="in float32 only"):
        reproduce_larger("--keras", "--dtype=bfloat16")
    monkeypatch.setattr(environment, "version_of", {"keras": "3"}.get)
    with pytest.raises(UserError, match="--keras needs tensorflow, which is not installed"):
        reproduce_larger("--keras")


def test_the_work_of_larger_by_hand():
    convolutions = 2 * 2 * 24 * 24 * 25 * 30 + 3 * 2 * 10 * 10 * 9 * 30 * 15
    dense = 3 * 2 * (375 * 128 + 128 * 50 + 50 * 10)
    outputs = 12 * 12 * 30 + 5 * 5 * 15 + 128 + 50 + 10
    found = limits.work("larger")
    assert found == (convolutions + dense, 784 + 16 * outputs, 4 * 10 * 59_933)
    assert limits.work("larger", "bfloat16") == found._replace(image_bytes=784 + 8 * outputs)


def test_shares_of_the_limit_and_of_a_step():
    result = {
        "device": "cpu",
        "hardware": "a machine",
        "versions": {"jax": "1"},
        "batch_size": 200,
        "ceilings": [{"flop": 100e9, "bytes": 1e9}],
        "work": {"flop": 4_000_000, "image_bytes": 10_000, "step_bytes": 2_000_000},
        "images_per_second": {"20": [2_000], "200": [10_000]},
        "profile": {"step": 1000.0, "parts": {"forward": 30, "backward": 60, "optimizer": 10}},
    }
    text = limits.table({"larger": result})
    # At 200 a step moves 4 MB in 4 ms and computes 8 ms; at 20, 2.2 MB in 2.2 ms against 0.8 ms.
    row = "| `larger` (200) | 10,000 (10,000 to 10,000) | 40.0 | 0.2 | FLOP | 40% |"
    assert row in text
    assert "| `larger` (20) | 2,000 (2,000 to 2,000) | 8.0 | 0.2 | bytes | 22% |" in text
    assert "| `larger` | 30% | 60% | 10% | 0% | 0% | 0% | 1,000 |" in text
    conditions = "Ceilings: 100 GFLOP/s in a product, 1.0 GB/s in a copy. Medians of 1 turns; "
    assert f"\n{conditions}a machine; jax 1.\n" in text
    # On a GPU kernels of 100 µs leave the rest of a step of 20 ms idle.
    on_gpu = result | {"device": "gpu", "hardware": "another"}
    text = limits.table({"larger": result, "convnet": on_gpu})
    assert "| `convnet` | 0% | 0% | 0% | 0% | 0% | 100% | 20,000 |" in text
    assert f"\n`convnet`: {conditions}another; jax 1.\n" in text


def test_limits_are_kept_network_by_network(monkeypatch, tmp_path):
    def child(name, device, *flags, **variables):
        if name == "scaling":
            return {"images_per_second": 100.0}
        (measured,) = flags
        if "network" in measured and "convnet" in measured:
            raise UserError("benchmarks.limits failed, as said above")
        if "network" in measured:
            assert ("XLA_FLAGS" in variables) == (device == "gpu")
            return {"step": 10.0, "parts": {"forward": 5.0}}
        assert json.loads(measured.partition("=")[2]) == {"compute_dtype": "bfloat16"}
        return {"flop": 1e9, "bytes": 1e9}

    monkeypatch.setattr(suite, "child", child)
    flags = [f"--results={tmp_path}", "--dtype=bfloat16", "--repetitions=2", "--batch-sizes", "64"]
    limits.main(["--networks", "larger", *flags])
    limits.main(["--networks", "convnet", *flags])
    results = json.loads((tmp_path / "limits_cpu_bfloat16.json").read_text())
    assert list(results) == ["larger", "convnet"]
    assert results["larger"]["images_per_second"] == {"64": [100, 100], "200": [100, 100]}
    assert results["convnet"]["images_per_second"] == {"64": [100, 100]}
    assert "profile" in results["larger"] and "profile" not in results["convnet"]
    # What is stopped before it has new ones keeps the results of before.
    train = scaling.run
    monkeypatch.setattr(
        scaling, "run", lambda *given: sys.exit(130) if "convnet" in given else train(*given)
    )
    with pytest.raises(SystemExit):
        limits.main(["--networks", "larger", "convnet", *flags])
    found = json.loads((tmp_path / "limits_cpu_bfloat16.json").read_text())
    assert found["larger"]["images_per_second"]["64"] == [100]
    assert found["convnet"] == results["convnet"]
    results = found
    # On a GPU, without its graphs.
    assert limits.run("gpu", {"network": "larger"})["step"] == 10
    text = (tmp_path / "limits_cpu_bfloat16.md").read_text()
    assert text == limits.table(results)


def test_a_profile_names_the_parts_of_a_step():
    found = limits.profile("baseline")
    assert set(found["parts"]) == {"forward", "backward", "optimizer", "gather", "other"}
    assert all(found["parts"][part] > 0 for part in ("forward", "backward", "optimizer", "gather"))
    assert found["step"] > 0 and len(found["largest"]) == 5


def test_of_a_gpus_profile_its_own_kernels_count():
    def plane(name, *events):
        events = [
            SimpleNamespace(name=event, stats=[("hlo_op", op)] if op else [], duration_ns=2000)
            for event, op in events
        ]
        lines = [SimpleNamespace(name=line, events=events) for line in ("Stream #1", "XLA Ops")]
        return SimpleNamespace(name=name, lines=lines[: 2 if "GPU" in name else 1])

    program = (
        '  fusion.1 = f32[] fusion(a), metadata={op_name="jvp(x)"}\n'
        "  copy.2 = f32[] copy(a)\n"
        '  while.3 = f32[] while(a), metadata={op_name="loop"}\n'
    )
    device = plane("/device:GPU:0", ("kernel", "fusion.1"), ("kernel", "copy.2"), ("wait", None))
    host = plane("/host:CUPTI", ("fusion.1", None))
    found = limits.operations(SimpleNamespace(planes=[host, device]), program, on_gpu=True)
    assert found == {("fusion.1", "jvp(x)"): 2, ("copy.2", ""): 2, ("wait", ""): 2}
    assert limits.part("") == "other"
    with pytest.raises(UserError, match="nothing of the device"):
        limits.operations(SimpleNamespace(planes=[host]), program, on_gpu=True)
    host = plane("/host:CPU", ("copy.2", None), ("while.3", None), ("a thread", None))
    found = limits.operations(SimpleNamespace(planes=[host]), program, on_gpu=False)
    assert found == {("copy.2", ""): 2}


@pytest.mark.parametrize("flags", [["--repetitions=0"], ["--seconds=-1"], ["--seconds=nan"]])
def test_a_number_that_measures_nothing_is_refused(flags, tmp_path):
    with pytest.raises(UserError, match="above 0 value"):
        throughput.main([*flags, f"--results={tmp_path}"])


def test_a_peer_of_another_device_is_refused(tmp_path):
    with pytest.raises(UserError, match="on cpu the peers are mnist_flax, flax-loop, keras-tf"):
        throughput.main(["--peers", "torch-cudagraphs", f"--results={tmp_path}"])


def test_bars_are_plotted(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    suite.bars(
        {"images/s": {"a": [1, 2, 4], "b": [3]}, "seconds": {"a": [1], "b": [2]}},
        tmp_path / "x.png",
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_kernels_of_a_step_are_those_of_the_loop_over_the_steps():
    program = """
%step.1 (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %gemm_fusion_dot = f32[8]{0} fusion(%arg), kind=kCustom, calls=%gemm_fusion_dot_computation
  %conv = (f32[8]{0}, u8[0]{0}) custom-call(%arg), custom_call_target="__cudnn$convForward"
  %y = f32[8]{0} get-tuple-element(%conv), index=0
  %add = (f32[8]{0}, /*index=1*/f32[8]{0}) fusion(%gemm_fusion_dot), kind=kLoop, calls=%fused_add
  %copy = f32[2,4]{0,1} copy(%y)
  ROOT %out = (s32[], f32[8]{0}) tuple(%n, %copy)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %before = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_copy
  %end = (s32[], f32[8]{0}) while(%a), body=%step.1, {"known_trip_count":{"n":"10"}}
}
"""
    assert kernels.count(program) == {"convolutions": 1, "products": 1, "others": 2}
