"""What the user sees of a run."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mnist_flax import steps
from mnist_flax.position import Position

if TYPE_CHECKING:
    from mnist_flax.parts import Data


def header(config: ConfigDict, parameters: int, data: "Data", run_dir: Path, device: str) -> None:
    """Network, data, device and run folder, before compiling and training."""
    counts = [f"{data.train.size:,} to train on ({config.data.train_split})"]
    if data.watch is not None and data.watch is not data.test:
        counts.append(f"{data.watch.size:,} to watch ({config.data.watch_split})")
    counts.append(f"{data.test.size:,} to test on ({config.data.test_split})")
    lines = {
        "network": f"{config.model}, {parameters:,} parameters",
        "data": f"{config.data.name}, {', '.join(counts)}",
        "training": f"{config.epochs} epochs in batches of {config.batch_size}, "
        f"{config.optimizer}, learning rate {config.learning_rate:g} ({config.schedule}), "
        + _seeds(config),
        "device": f"{device}, {config.compute_dtype}",
        "run folder": run_dir,
    }
    for name, text in lines.items():
        print(f"{name:<11} {text}")
    sys.stdout.flush()


def resuming(step: int, epochs_done: int, epochs: int) -> None:
    """Where a run goes on."""
    print(
        f"{'resuming':<11} after step {step:,}, {epochs_done} of {epochs} epochs done", flush=True
    )


def progress(position: Position, epochs: int, examples: int) -> tqdm:
    """A bar over the examples of an epoch; silent where the output is not a terminal.

    It starts after compilation, so that speed and time left are those of training.
    """
    return tqdm(
        desc=f"epoch {position.epoch + 1}/{epochs}",
        total=examples,
        initial=int(np.sum(position.count)),
        unit=" images",
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        disable=not sys.stdout.isatty(),
        file=sys.stdout,
    )


def advance(bar: tqdm, position: Position) -> None:
    """Moves the bar to the examples trained on and shows their loss and accuracy."""
    means = steps.averages(position)
    loss, accuracy = np.mean(means["loss"]), np.mean(means["accuracy"])
    bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2%}", refresh=False)
    bar.update(np.sum(position.count) - bar.n)


def epoch(row: dict[str, Any], config: ConfigDict) -> None:
    """One line on a finished epoch."""
    number = f"{row['epoch']:>{len(str(config.epochs))}}/{config.epochs}"
    line = f"epoch {number}  loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.2%}"
    if row["watch_accuracy"] is not None:
        line += f"  |  {config.data.watch_split}: loss {row['watch_loss']:.4f}  "
        line += f"accuracy {row['watch_accuracy']:.2%}"
    digits = 1 if row["seconds"] >= 1 else 2
    line += f"  |  {row['images_per_second']:,.0f} images/s  {row['seconds']:.{digits}f} s"
    print(line, flush=True)


def score(scored: dict[str, Any], what: str = "Test") -> None:
    """Loss, accuracy and error as the tutorials print them; `scored` as `scoring` gives it."""
    right = round(scored["accuracy"] * scored["count"])
    print(f"{what} loss: {scored['loss']:.4f}")
    print(f"{what} accuracy: {scored['accuracy']:.2%} ({right:,} of {scored['count']:,} right)")
    print(f"Error: {1 - scored['accuracy']:.2%}", flush=True)


def result(summary: dict[str, Any], run_dir: Path) -> None:
    """The end of a run: its score, and what can be done with it."""
    if seeds := summary.get("seeds"):
        for each in seeds:
            print(f"Test accuracy of seed {each['seed']}: {each['test_accuracy']:.2%}")
        print(
            f"Test accuracy: {summary['test_accuracy']:.2%} ± "
            f"{summary['test_accuracy_deviation']:.2%}, from {summary['test_accuracy_min']:.2%} to "
            f"{summary['test_accuracy_max']:.2%} (mean and deviation of {len(seeds)} seeds)"
        )
        next_steps(run_dir, f"--seed={seeds[0]['seed']}")
        return
    score(
        {
            "loss": summary["test_loss"],
            "accuracy": summary["test_accuracy"],
            "count": summary["test_examples"],
        }
    )
    next_steps(run_dir)


def next_steps(run_dir: Path, *flags: str) -> None:
    """What can be done with a trained network."""
    print(f"{'evaluate':<11} {command('evaluate', str(run_dir), *flags)}")
    print(f"{'predict':<11} {command('predict', str(run_dir), 'IMAGE.png', *flags)}", flush=True)


def _seeds(config: ConfigDict) -> str:
    if config.num_seeds == 1:
        return f"seed {config.seed}"
    last = config.seed + config.num_seeds - 1
    return f"seeds {config.seed} to {last}, of which the means are shown"


def command(module: str, *args: str) -> str:
    """What to type to run one of this package's programs as this process is run."""
    executable = Path(sys.executable)
    # The one of an environment that is active, and not another's.
    found = shutil.which("python")
    if executable.is_relative_to(Path.cwd()):
        python = str(executable.relative_to(Path.cwd()))
    elif found and Path(found).parent == executable.parent:
        python = "python"
    else:
        python = sys.executable
    return shlex.join([python, "-m", f"mnist_flax.{module}", *args])


def finished_before(run_dir: Path) -> None:
    """Answers a command that would train a finished run again."""
    print(f"The run in {run_dir} is finished; nothing is left to do. Its result:")


def stopped(message: str, resuming_command: str) -> None:
    """How to go on after a signal."""
    print(f"{message}; go on with\n  {resuming_command}", file=sys.stderr, flush=True)
