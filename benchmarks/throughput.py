"""Training speed beside what a user would pick instead: Keras, PyTorch and a plain Flax loop.

    python -m benchmarks.throughput                                  # every network and peer
    python -m benchmarks.throughput --networks larger --peers torch keras-tf
    python -m benchmarks.throughput --device gpu --dtype bfloat16

Every peer trains the same network (the parameters are counted) with the same optimiser on the
same batches of MNIST, in a process of its own. The processes of a network take turns, so that a
slow spell of the machine meets them all; a turn's clock stops when the device has finished. A
peer that fails, trains another network or does not learn is left out, and named at the end. On CPU
all have the C library keep the memory that they free, and TensorFlow use oneDNN, without which some
are half as fast.
`pip install ".[bench]"` brings the peers, on a GPU with `"jax[cuda12]" "tensorflow[and-cuda]"`, as
TensorFlow has wheels for CUDA 12 alone; MNIST must have been prepared, which training a recipe once
does.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import hardware, recipes, suite
from mnist_flax import batches, cli, datasets, models
from mnist_flax.errors import UserError

OURS = "mnist_flax"


@dataclass(frozen=True)
class PeerSpec:
    """Which of `benchmarks.peers` to run, how, and what it needs."""

    module: str
    variant: str = ""
    packages: tuple[str, ...] = ()
    backend: str = ""
    device: str | None = None


PEERS = {
    OURS: PeerSpec("ours"),
    "flax-loop": PeerSpec("flax_loop"),
    "keras-tf": PeerSpec("keras_fit", "", ("keras", "tensorflow"), "tensorflow"),
    "keras-tf-jit": PeerSpec(
        "keras_fit", "jit", ("keras", "tensorflow"), "tensorflow", device="cpu"
    ),
    "keras-tf-jit-steps": PeerSpec(
        "keras_fit", "jit steps", ("keras", "tensorflow"), "tensorflow", device="cpu"
    ),
    "keras-tf-nojit": PeerSpec(
        "keras_fit", "nojit", ("keras", "tensorflow"), "tensorflow", device="gpu"
    ),
    "keras-tf-steps": PeerSpec("keras_fit", "steps", ("keras", "tensorflow"), "tensorflow"),
    "keras-jax": PeerSpec("keras_fit", "", ("keras",), "jax"),
    "keras-jax-steps": PeerSpec("keras_fit", "steps", ("keras",), "jax"),
    "torch": PeerSpec("torch_loop", "eager", ("torch",)),
    "torch-channels-last": PeerSpec("torch_loop", "channels_last", ("torch",)),
    "torch-compile": PeerSpec("torch_loop", "compile", ("torch",)),
    "torch-cudagraphs": PeerSpec("torch_loop", "cudagraphs", ("torch",), device="gpu"),
    "torch-graph": PeerSpec("torch_loop", "graph", ("torch",), device="gpu"),
    "torch-compile-graph": PeerSpec("torch_loop", "compile_graph", ("torch",), device="gpu"),
}
# What makes peers faster on CPU, and ours no slower.
FASTER_ON_CPU = {
    # The frameworks ask the system for the memory of a step's arrays on the host anew in each step,
    # and have it cleared page by page, unless the C library keeps what is freed.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "THP_MEM_ALLOC_ENABLE": "1",
    # TensorFlow uses it by itself only where a processor has AVX-512's instructions for networks.
    "TF_ENABLE_ONEDNN_OPTS": "1",
}
# The columns of `costs`.
COSTS = "command to first step | of which building and compiling | peak memory"


def main(argv: list[str] | None = None) -> None:
    parser = suite.parser("throughput", __doc__, seconds=3, dtype=True, networks=True)
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: all for the device")
    parser.add_argument(
        "--dataset", default="mnist", help="one of 28×28×1 pixels; default: %(default)s"
    )
    args = parser.parse_args(argv)

    possible = [peer for peer, kind in PEERS.items() if kind.device in (None, args.device)]
    if not set(args.peers or []) <= set(possible):
        raise UserError(f"on {args.device} the peers are {', '.join(possible)}")
    suite.check_installed(("the plot", "matplotlib"))
    # Ours is always measured: the ratios are to it.
    able = suite.installed({peer: PEERS[peer].packages for peer in possible}, args.peers)
    peers = list({OURS: None} | dict.fromkeys(able))
    origin = hardware.origin(args.device, hardware.PEER_PACKAGES)
    kind = suite.suffix(args.device, args.dtype, args.dataset)
    file = args.results / f"throughput_{kind}.json"
    measured = json.loads(file.read_text()) if file.exists() else {}
    missing = []
    for network in args.networks:
        measured[network] = {
            **origin,
            "batch_size": recipes.config(network).batch_size,
            "dataset": args.dataset,
            "seconds_a_turn": args.seconds,
            "peers": measure(network, peers, args),
        }
        missing += [f"{p} of {network}" for p in peers if p not in measured[network]["peers"]]
        # After each network, so that a long run that is stopped keeps what it has.
        measured = {name: measured[name] for name in models.names() if name in measured}
        suite.write(measured, file, table(measured))
        plot(measured, file.with_suffix(".png"))
    if missing:
        raise SystemExit(f"not measured, as said above: {', '.join(missing)}")


def measure(network: str, peers: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """Starts the peers' processes, lets them take turns, and returns what each reported.

    A peer that fails is left out.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_job(Path(folder), network, args)
        workers, reports = {}, {}

        @contextmanager
        def without(peer: str) -> Iterator[None]:
            """Goes on without a peer that fails in the block; but not without ours."""
            try:
                yield
            except UserError as failure:
                if peer == OURS:
                    raise
                log(f"{failure}\n{network}: goes on without {peer}")
                reports.pop(peer, None)
                if dropped := workers.pop(peer, None):
                    # What could not be written is still there, and would be tried again at the end.
                    with suppress(BrokenPipeError):
                        dropped.stdin.close()

        for peer in peers:
            worker = stack.enter_context(start(peer, Path(folder), args.device))
            # Where this process is stopped, it does not wait for one that hangs.
            stack.callback(worker.kill)
            # One after the other: two that compile at once would slow each other down.
            with without(peer):
                reports[peer] = receive(worker, peer, Path(folder)) | {"images_per_second": []}
                workers[peer] = worker
                log(f"{network}: {peer} is ready, {reports[peer]['first_step_seconds']:.1f} s")
        for turn in range(args.repetitions):
            # Each begins a round once, before it is anyone's second turn to.
            names = list(workers)
            first = turn % len(names)
            for peer in names[first:] + names[:first]:
                worker = workers[peer]
                with suppress(BrokenPipeError):
                    worker.stdin.write(f"{args.seconds}\n")
                    worker.stdin.flush()
                with without(peer):
                    measured = receive(worker, peer, Path(folder))["images_per_second"]
                    reports[peer]["images_per_second"].append(measured)
                    log(f"{network}: {turn + 1}/{args.repetitions} {peer} {measured:,.0f} images/s")
        for peer, worker in list(workers.items()):
            worker.stdin.close()
            with without(peer):
                reports[peer] |= receive(worker, peer, Path(folder))
                check(peer, reports[peer], reports[OURS])
    return reports


def write_job(folder: Path, network: str, args: argparse.Namespace) -> None:
    """Writes what all peers read: the network and recipe as JSON, data and batches as .npz."""
    config = recipes.config(network)
    job = {
        "network": network,
        "spec": recipes.spec_of(network),
        "batch_size": config.batch_size,
        "optimizer": config.optimizer,
        "device": args.device,
        "dtype": args.dtype,
    }
    arrays = datasets.load(args.dataset, "train")
    if (shape := arrays.images.shape[1:]) != (28, 28, 1):
        raise UserError(f"{args.dataset} has images of {shape}, and the peers take (28, 28, 1)")
    # Full batches only, which no peer must pad.
    count = len(arrays.labels) // config.batch_size * config.batch_size
    rows = batches.train_batches(0, 0, count, config.batch_size)
    (folder / "job.json").write_text(json.dumps(job))
    images, labels = arrays.images[:count], arrays.labels[:count]
    np.savez(folder / "data.npz", images=images, labels=labels, rows=rows)


def start(peer: str, folder: Path, device: str) -> subprocess.Popen:
    """A worker process of the peer, on the device; its stderr goes to a file in the folder."""
    kind = PEERS[peer]
    env = os.environ | suite.on_device(device) | (FASTER_ON_CPU if device == "cpu" else {})
    env |= {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # The first step is that of a program never compiled before.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{peer}"),
    }
    if kind.backend:
        env["KERAS_BACKEND"] = kind.backend
    command = [sys.executable, "-m", "benchmarks.worker", str(folder), kind.module, kind.variant]
    with open(folder / f"{peer}.log", "w") as log_file:
        return subprocess.Popen(
            [*command, str(time.time())],
            cwd=recipes.ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
        )


def receive(worker: subprocess.Popen, peer: str, folder: Path) -> dict:
    """The worker's next report; raises UserError with its stderr if it died."""
    for line in worker.stdout:
        # A framework may print lines of its own.
        if line.startswith("{"):
            return json.loads(line)
    raise UserError((folder / f"{peer}.log").read_text() + f"\n{peer} failed, as said above")


def check(peer: str, report: dict, ours: dict) -> None:
    """Raises UserError unless a peer trained the network that ours did, and trained it indeed."""
    if report["parameters"] != ours["parameters"]:
        raise UserError(f"{peer} trained another network: {report['parameters']} parameters")
    # One that knows nothing gives each of ten digits the same probability.
    if not report["loss_after"] < 0.8 * math.log(10):
        raise UserError(f"{peer} did not learn: its loss is {report['loss_after']:.3f} at the end")


def speed(reports: dict[str, dict], peer: str) -> float:
    """Median images/s."""
    return statistics.median(reports[peer]["images_per_second"])


def best_peer(reports: dict[str, dict]) -> str | None:
    """The fastest but for ours; None if ours ran alone."""
    others = [peer for peer in reports if peer != OURS]
    return max(others, key=lambda peer: speed(reports, peer)) if others else None


def table(measured: dict[str, dict]) -> str:
    """Ours beside the best peer, then every peer, as Markdown."""
    lines = [
        "| network (batch) | images/s (lowest to highest) | steps/s | best peer | ratio to it "
        f"| {COSTS} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for network, result in measured.items():
        reports, batch = result["peers"], result["batch_size"]
        best, against = best_peer(reports), "– | –"
        if best:
            ratios.append(speed(reports, OURS) / speed(reports, best))
            against = f"{best}, {speed(reports, best):,.0f} | **{ratios[-1]:.2f}**"
        lines.append(
            f"| `{network}` ({batch}) | {suite.spread(reports[OURS]['images_per_second'])} "
            f"| {speed(reports, OURS) / batch:,.1f} | {against} | {costs(reports[OURS])} |"
        )
    if ratios:
        mean = statistics.geometric_mean(ratios)
        lines += ["", f"Geometric mean of the ratios: {mean:.2f}."]
    conditions = {}
    for network, result in measured.items():
        turns = len(result["peers"][OURS]["images_per_second"])
        beside = ", ".join(peer for peer in result["peers"] if peer != OURS) or "no peer"
        conditions[network] = (
            f"Speeds are medians of {turns} turns beside {beside}, seconds and memory those of one "
            f"start; {suite.conditions(result)}"
        )
    for line in suite.grouped(conditions):
        lines += ["", line]

    lines += [
        "",
        "The peers that were measured; the ratio is ours to it:",
        "",
        f"| network | peer | images/s (lowest to highest) | ratio | {COSTS} |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, result in measured.items():
        reports = result["peers"]
        lines += [
            f"| `{network}` | {peer} | {suite.spread(reports[peer]['images_per_second'])} "
            f"| {speed(reports, OURS) / speed(reports, peer):.2f} | {costs(reports[peer])} |"
            for peer in PEERS
            if peer in reports
        ]
    return "\n".join(lines) + "\n"


def costs(report: dict) -> str:
    """The cells under `COSTS`; the memory is the GPU's where it has one."""
    memory = report["device_memory_mib"] or report["peak_memory_mib"]
    return (
        f"{report['first_step_seconds']:.1f} s | {report['compile_seconds']:.1f} s "
        f"| {memory:,.0f} MiB"
    )


def plot(measured: dict[str, dict], file: Path) -> None:
    """Bars of every peer's speed, as a share of ours."""
    names = [p for p in PEERS if any(p in result["peers"] for result in measured.values())]
    figure = suite.figure(1.6 * len(measured) + 2, 4.5)
    axes = figure.subplots()
    width = 0.8 / len(names)
    for i, peer in enumerate(names):
        have = [(j, r["peers"]) for j, r in enumerate(measured.values()) if peer in r["peers"]]
        heights = [speed(reports, peer) / speed(reports, OURS) for _, reports in have]
        places = [j + (i - (len(names) - 1) / 2) * width for j, _ in have]
        axes.bar(places, heights, width, label=peer, color="black" if peer == OURS else None)
    axes.set_xticks(range(len(measured)), measured, rotation=15)
    axes.set_ylabel(f"training speed, {OURS} = 1")
    figure.legend(loc="outside upper center", ncols=5, fontsize="small")
    figure.savefig(file, dpi=120)


def log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
