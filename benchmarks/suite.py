"""What every benchmark has in common: its command line, what it writes, and what it ran on."""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.recipes import ROOT
from mnist_flax import cli, environment, files, models
from mnist_flax.config import COMPUTE_DTYPES
from mnist_flax.errors import UserError

FOLDER = Path(__file__).parent / "results"


def parser(
    name: str,
    doc: str,
    repetitions: int | None = 5,
    seconds: float | None = None,
    device: bool = True,
    dtype: bool = False,
    networks: bool = False,
) -> argparse.ArgumentParser:
    """The command line of `benchmarks.<name>`.

    Args:
        name, doc: of the script.
        repetitions, seconds: the defaults of these flags; None leaves one out.
        device, dtype, networks: whether it has these flags.
    """
    made = cli.parser(f"benchmarks.{name}", doc)
    if device:
        made.add_argument(
            "--device", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s"
        )
    if dtype:
        made.add_argument(
            "--dtype", choices=COMPUTE_DTYPES, default="float32", help="default: %(default)s"
        )
    if repetitions:
        made.add_argument(
            "--repetitions", type=positive(int), default=repetitions, help="default: %(default)s"
        )
    if seconds:
        made.add_argument(
            "--seconds",
            type=positive(float),
            default=seconds,
            help="training time of a turn; default: %(default)s",
        )
    if networks:
        made.add_argument(
            "--networks",
            nargs="+",
            choices=models.names(),
            default=models.names(),
            help="default: all",
        )
    made.add_argument("--results", type=Path, default=FOLDER, help="folder to write to")
    return made


def suffix(device: str, dtype: str = "float32", dataset: str = "mnist") -> str:
    """What the file of a result is called after: the device, and what is not as usual."""
    unusual = [value for value in (dtype, dataset) if value not in ("float32", "mnist")]
    return "_".join([device, *unusual])


def positive(kind: type) -> Callable[[str], Any]:
    """The type of an argument that must be an int or a float above 0."""

    def number(text: str) -> Any:
        if not 0 < kind(text) < math.inf:
            raise ValueError
        return kind(text)

    number.__name__ = f"{kind.__name__} above 0"
    return number


def child(name: str, device: str, *flags: str, **variables: str) -> dict[str, Any]:
    """The JSON that `benchmarks.<name>` prints last, in a process of its own on that device.

    Args:
        variables: what is to differ in its environment.

    Raises:
        UserError: it failed, and has said why.
    """
    env = os.environ | on_device(device) | variables
    if device == "cpu":
        # A program from a cache leaves out the memory that compiling takes.
        env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"benchmarks.{name} failed, as said above")
    return json.loads(done.stdout.splitlines()[-1])


def on_device(device: str) -> dict[str, str]:
    """Environment variables with which a process computes on the device "cpu" or "gpu" alone."""
    if device == "cpu":
        return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}
    return {
        # Named, since JAX would fall back to the CPU.
        "JAX_PLATFORMS": "cuda",
        # XLA would say of each convolution that it tries.
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Several processes share the memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }


def check_installed(*needs: tuple[str, str]) -> None:
    """Raises UserError unless there is each package of the pairs (what needs it, package)."""
    for what, package in needs:
        if environment.version_of(package) is None:
            raise UserError(
                f"{what} needs {package}, which is not installed: run `pip install '.[bench]'`"
            )


def installed(packages: dict[str, Sequence[str]], asked: Sequence[str] | None) -> list[str]:
    """The names asked for; otherwise those whose packages are installed, and the others are said.

    Raises:
        UserError: a package of one that was asked for is not.
    """
    if asked:
        check_installed(*((name, package) for name in asked for package in packages[name]))
        return list(asked)
    found = []
    for name, needed in packages.items():
        lacking = [package for package in needed if environment.version_of(package) is None]
        if lacking:
            print(f"{name} is left out: it needs {lacking[0]}", flush=True)
        else:
            found.append(name)
    return found


def write(result: dict[str, Any], file: Path, text: str) -> None:
    """Writes all figures as JSON, and a table beside them, each whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    files.replace_text(file, json.dumps(result, indent=1) + "\n")
    files.replace_text(file.with_suffix(".md"), text)


def grouped(texts: dict[str, str]) -> list[str]:
    """Lines that say each text once, and if they differ, of which networks."""
    networks = {}
    for network, text in texts.items():
        networks.setdefault(text, []).append(f"`{network}`")
    if len(networks) == 1:
        return list(networks)
    return [f"{', '.join(named)}: {text}" for text, named in networks.items()]


def conditions(result: dict[str, Any]) -> str:
    """Hardware, commit and versions of a result, for the line below a table."""
    found = [f"{name} {version}" for name, version in result["versions"].items() if version]
    commit = [f"commit {result['commit']}"] if result.get("commit") else []
    return "; ".join([result["hardware"], *commit, ", ".join(found)]) + "."


def figure(width: float, height: float) -> Any:
    """An empty Matplotlib figure of that size in inches."""
    # Imported by the scripts that plot alone, and without pyplot, which looks for a screen.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def bars(panels: dict[str, dict[str, Sequence[float]]], file: Path) -> None:
    """Plots medians as bars, with the lowest and highest, in one panel for each title."""
    drawn = figure(9, 2.6)
    axes = drawn.subplots(1, len(panels), squeeze=False, sharey=True)
    for panel, (title, named) in zip(axes[0], panels.items(), strict=True):
        medians = [statistics.median(values) for values in named.values()]
        below = [m - min(values) for m, values in zip(medians, named.values(), strict=True)]
        above = [max(values) - m for m, values in zip(medians, named.values(), strict=True)]
        panel.barh(list(named), medians, xerr=(below, above), color="gray", capsize=3)
        panel.set_xlabel(title)
    axes[0][0].invert_yaxis()
    drawn.savefig(file, dpi=120)


def spread(values: Sequence[float], form: str = ",.0f", unit: str = "") -> str:
    """The median, and the lowest and highest."""
    low, middle, high = (f"{f(values):{form}}" for f in (min, statistics.median, max))
    return f"{middle}{unit} ({low} to {high})"
