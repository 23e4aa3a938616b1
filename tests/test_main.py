"""The command line, mostly in processes of its own, as a user meets it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mnist_flax import main, report, signals
from mnist_flax.errors import UserError

REPOSITORY = Path(__file__).parents[1]
LARGER = "--config=configs/larger.py:digits"


def command(*args, module="main"):
    return [sys.executable, "-m", f"mnist_flax.{module}", *map(str, args)]


def run(*args, **kwargs):
    return subprocess.run(
        command(*args, **kwargs), cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def parse(monkeypatch, *args):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["main", *args])
    # The flags library loads every recipe into the one module.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    return main.parse()


def refusal(monkeypatch, *args):
    """The one sentence with which a command line is refused."""
    with pytest.raises(UserError) as error:
        parse(monkeypatch, *args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_overrides_reach_the_configuration(monkeypatch):
    config, workdir = parse(
        monkeypatch, LARGER, "--config.batch_size=7", "--config.data.train_split=train[5:]"
    )
    assert (config.name, config.batch_size, workdir) == ("larger-digits", 7, None)
    assert config.data.train_split == "train[5:]"


def test_a_recipe_in_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(REPOSITORY / "configs/larger.py", tmp_path / "mine.py")
    config, _ = parse(monkeypatch, "--config=~/mine.py:digits")
    assert config.name == "larger-digits"


def test_runs_started_in_one_second_have_folders_of_their_own(monkeypatch):
    folders = []
    monkeypatch.setattr(main.train, "train_and_evaluate", lambda _, folder: folders.append(folder))
    config, _ = parse(monkeypatch, LARGER)
    monkeypatch.setattr(main, "parse", lambda: (config, None))
    for _ in range(20):
        main.main()
    assert len(set(folders)) == 20 and folders[0].startswith("runs/larger-digits-2")


def test_the_command_that_goes_on_names_the_folder_of_the_run(monkeypatch, capsys):
    folders = []

    def stopped(config, folder):
        folders.append(folder)
        raise signals.Stopped(signal.SIGTERM, saved=True)

    config, _ = parse(monkeypatch, LARGER)
    monkeypatch.setattr(main.train, "train_and_evaluate", stopped)
    monkeypatch.setattr(main, "parse", lambda: (config, None))
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 128 + signal.SIGTERM
    assert f"mnist_flax.main {LARGER} --workdir={folders[0]}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.bach_size=3"], "no configuration key 'bach_size'; did you mean 'batch_size'"),
        (["--config.data=3"], "no configuration key 'data'; did you mean 'data.name'"),
        (["--config.batch_size=many"], "batch_size='many' must be a whole number"),
        (["--config.batch_size=1.5"], "batch_size='1.5' must be a whole number"),
        (["--config.learning_rate=fast"], "learning_rate='fast' must be a number"),
        (["--wrokdir=x"], "Unknown command line flag 'wrokdir'"),
        (["stray"], "'stray' is no flag"),
        (["--workdir="], "--workdir is empty: name a folder"),
        (["--flagfile=nowhere"], "nowhere"),
    ],
)
def test_a_bad_flag_is_one_sentence(monkeypatch, args, message):
    assert message in refusal(monkeypatch, LARGER, *args)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--config=configs/lager.py", "there is no recipe file configs/lager.py to read"),
        ("--config=configs/lager.py:digits", "there is no recipe file configs/lager.py to read"),
        ("--config=configs", "there is no recipe file configs to read"),
        ("--config=Makefile", "the recipe file cannot be used"),
        ("--config=mnist_flax/errors.py", "the recipe file cannot be used"),
        ("--config=", "name a recipe: --config=configs/larger.py"),
        ("--workdir=x", "name a recipe: --config=configs/larger.py"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_sentence(monkeypatch, arg, message):
    for args in ([arg], [arg, "--config.epochs=1"]):
        assert message in refusal(monkeypatch, *args)


def test_without_a_recipe_one_is_asked_for(monkeypatch):
    assert "name a recipe: --config=configs/larger.py" in refusal(monkeypatch)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('return recipe("mine", "digits", modle="larger")', "did you mean 'model'?"),
        ("return None + 1", "the recipe file cannot be used (TypeError("),
        ("open('missing')", "the recipe file cannot be used (FileNotFoundError("),
        ("return {}", "the recipe file gives {} instead of a ConfigDict"),
        ("return", "the recipe file gives None instead of a ConfigDict"),
    ],
)
def test_a_fault_in_a_recipe_is_one_sentence(monkeypatch, tmp_path, body, message):
    (tmp_path / "mine.py").write_text(
        f"from mnist_flax.config import recipe\ndef get_config(): {body}\n"
    )
    assert message in refusal(monkeypatch, f"--config={tmp_path}/mine.py")


def test_a_recipe_without_a_name_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(main, "parse", lambda: (ConfigDict({"model": "larger"}), None))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is missing: start from config.default"):
        main.main()
    assert not list(tmp_path.iterdir())


def test_help_names_every_key():
    done = run("--help")
    assert done.returncode == 0
    assert "  data.train_split=train\n" in done.stdout


def test_train_evaluate_and_train_again(data_dir, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    # Nothing compiles too fast to be kept.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    args = ("--config=configs/baseline.py:digits", "--config.epochs=1", f"--workdir={run_dir}")
    done = run(*args)
    assert done.returncode == 0, done.stderr
    # Piped, there is no bar: plain lines alone.
    assert "\r" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "network     baseline, 592,074 parameters"
    assert lines[1] == "data        digits, 1,500 to train on (train), 297 to test on (test)"
    assert lines[4] == f"run folder  {run_dir}"
    assert re.fullmatch(
        r"epoch 1/1  loss \d\.\d{4}  accuracy \d+\.\d\d%  \|  test: loss \d\.\d{4}  "
        r"accuracy \d+\.\d\d%  \|  [\d,]+ images/s  \d+\.\d\d? s",
        lines[5],
    )
    assert re.fullmatch(r"Test accuracy: \d+\.\d\d% \(\d+ of 297 right\)", lines[7])
    assert re.fullmatch(r"Error: \d+\.\d\d%", lines[8])

    # What a second start need not compile.
    cache = Path(os.environ["XDG_CACHE_HOME"], "mnist_flax")
    for program in ("create", "train_epoch", "eval_epoch"):
        assert list(cache.glob(f"*/jit_{program}-*"))

    assert [line.split()[0] for line in lines[9:]] == ["evaluate", "predict"]

    scored = run(run_dir, module="evaluate")
    assert scored.returncode == 0, scored.stderr
    assert scored.stdout.splitlines()[1:] == lines[6:9]

    again = run(*args)
    assert again.returncode == 0
    assert again.stdout.splitlines()[0] == (
        f"The run in {run_dir} is finished; nothing is left to do. Its result:"
    )

    other = run(*args, "--config.seed=8")
    assert other.returncode == 2
    assert "seed is 7 there and 8 now" in other.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in KiB on Linux alone")
def test_an_epoch_of_mnist_reads_digits_in_less_than_a_gibibyte(mnist, tmp_path):
    args = ("--config=configs/larger.py", "--config.epochs=1", "--config.seed=7")
    # By a process that holds nothing else when it forks.
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]).returncode; "
        "print(done, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    started = [sys.executable, "-c", code, *command(*args, f"--workdir={tmp_path}/run")]
    done = subprocess.run(started, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    status, memory = map(int, done.stdout.splitlines()[-1].split())
    assert status == 0, done.stderr
    assert 200 * 2**10 < memory < 2**20
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["train_examples"], summary["test_examples"]) == (60_000, 10_000)
    # Seeds 0, 1 and 2 gave 97.4, 97.7 and 97.4 %.
    assert summary["test_accuracy"] > 0.965


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--config.batch_size=0",), "batch_size=0 must be at least 1"),
        (("--config.model=lager",), "did you mean 'larger'"),
        (("--config.data.train_split=train[200%:]",), "train[200%:]"),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(tmp_path, args, message):
    done = run(LARGER, *args, f"--workdir={tmp_path}/run")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_no_network_and_no_mnist_names_three_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    # A proxy that refuses at once stands for a missing network, wherever this runs.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    done = run("--config=configs/larger.py", f"--workdir={tmp_path}/run")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: mnist is not prepared here and could not be downloaded")
    for way in (":digits", "--config.data.manual_dir", "MNIST_FLAX_MANUAL_DIR", "TFDS_DATA_DIR"):
        assert way in error
    assert not (tmp_path / "run").exists()


# SIGTERM is met in `test_train.py`.
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_run_and_says_how_to_go_on(data_dir, tmp_path, signum):
    run_dir = tmp_path / "run"
    # One signal meets each way to write a flag.
    workdir = [f"--workdir={run_dir}"] if signum == signal.SIGINT else ["--workdir", run_dir]
    args = (LARGER, "--config.epochs=500", *map(str, workdir))
    process = subprocess.Popen(
        command(*args), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("epoch   2"):
            process.send_signal(signum)
            break
    _, stderr = process.communicate()
    assert process.returncode == 128 + signum
    name = signal.Signals(signum).name
    # Where no other test has prepared the data, it says so before.
    lines = stderr.splitlines()
    go_on = lines[lines.index(f"stopped by {name} and saved; go on with") + 1]
    assert go_on.split()[1:] == ["-m", "mnist_flax.main", *args]
    steps = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir())
    assert steps[-1] >= 2 * 47


def test_printed_commands_are_those_of_this_environment(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv/bin/python"))
    arguments = "-m mnist_flax.predict 'my run' 7.png"
    for found, printed in (
        (tmp_path / ".venv/bin/python", "python"),
        # Of no environment that is active, or of another one.
        (None, tmp_path / ".venv/bin/python"),
        (tmp_path / "other/bin/python", tmp_path / ".venv/bin/python"),
    ):
        monkeypatch.setattr(report.shutil, "which", lambda name, found=found: found)
        assert report.command("predict", "my run", "7.png") == f"{printed} {arguments}"
    monkeypatch.chdir(tmp_path)
    assert report.command("predict", "my run", "7.png") == f".venv/bin/python {arguments}"


def test_evaluate_of_no_run_exits_with_2(tmp_path):
    done = run(tmp_path, module="evaluate")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path} is not a run folder (there is no config.json in it): "
        "give the folder that a training run printed\n"
    )


def test_networks_alone_are_imported_without_training():
    code = (
        "import sys, mnist_flax; mnist_flax.models.create('larger'); mnist_flax.steps.train_step; "
        "assert not {'orbax', 'tensorflow_datasets', 'ml_collections'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, cwd=REPOSITORY)


def test_the_readme_s_own_loop_runs(monkeypatch):
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (loop,) = [block for block in blocks if "train_epoch" in block]
    names = {}
    exec(loop, names)
    assert names["logits"].shape == (10, 26) and int(names["metrics"].count) == 1000
    names = "batches state optim config.default() train_and_evaluate load"
    code = "".join(f"; mnist_flax.{name}" for name in names.split())
    subprocess.run([sys.executable, "-c", f"import mnist_flax{code}"], check=True, cwd=REPOSITORY)
