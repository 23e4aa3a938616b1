"""What every benchmark has in common: its command line, what it writes, and what it ran on."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.recipes import ROOT

FOLDER = Path(__file__).parent / "results"


def parser(name: str, doc: str, repetitions: int | None = 5) -> argparse.ArgumentParser:
    """The command line of `benchmarks.<name>`; with `repetitions`, their default, it has those."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if repetitions:
        made.add_argument("--repetitions", type=int, default=repetitions)
    made.add_argument("--results", type=Path, default=FOLDER, help="folder to write to")
    return made


def child(name: str, device: str, *flags: str) -> dict[str, Any]:
    """The JSON that `benchmarks.<name>` prints last, in a process of its own on that device."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda",
        # A program from a cache leaves out the memory that compiling takes.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(result: dict[str, Any], file: Path, text: str) -> None:
    """Writes all figures as JSON, and a table beside them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(text)


def conditions(result: dict[str, Any]) -> str:
    """Hardware and versions of a result, for the line below a table."""
    found = [f"{name} {version}" for name, version in result["versions"].items() if version]
    return f"{result['hardware']}; {', '.join(found)}."


def spread(values: Sequence[float], form: str = ",.0f", unit: str = "") -> str:
    """The median, and the lowest and highest."""
    low, middle, high = (f"{f(values):{form}}" for f in (min, statistics.median, max))
    return f"{middle}{unit} ({low} to {high})"
