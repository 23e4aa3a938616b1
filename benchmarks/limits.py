"""How much of what the machine can do training reaches, and where the time goes.

    python -m benchmarks.limits
    python -m benchmarks.limits --networks convnet larger --device gpu --dtype bfloat16

A step needs at least the floating-point operations and the bytes that `Work` counts, however it is
carried out. The machine's ceilings are its fastest matrix product and its fastest copy, measured in
the same turns. What a step would take at these ceilings, over what it takes, is the share of the
limit. Winograd's filtering needs fewer operations than are counted, and what stays in a cache moves
no bytes, so that a share says how far the plain way could be from here, not how far any way could.

A profile of one device says where a step's time goes; that of a GPU is one without CUDA graphs, and
idle is what a step takes with them beyond the kernels. Every point is a process of its own.
"""

import argparse
import collections
import json
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import hardware, recipes, scaling, suite
from mnist_flax import cli, models, parallel, parts, steps, summary
from mnist_flax.errors import UserError

BATCH_SIZES = {"cpu": (128, 512), "gpu": (512, 2048, 8192)}
# Numbers of 4 bytes that an update of a parameter moves: the weight, read forwards, backwards and
# by the optimiser, and written; the gradient, written and read; each moment, read and written.
UPDATE = {"adam": 6 + 4, "rmsprop": 6 + 2}
PARTS = ("forward", "backward", "optimizer", "gather", "other", "idle")


class Work(NamedTuple):
    """What training needs at least.

    Attributes:
        flop: floating-point operations an image.
        image_bytes: bytes an image: of the image, and of each layer's output, which is written and
            read forwards, as its gradient is backwards.
        step_bytes: bytes a step: of the parameters and the optimiser's moments, in float32.
    """

    flop: int
    image_bytes: int
    step_bytes: int


def work(network: str, dtype: str = "float32") -> Work:
    """The work of the network's recipe, on images of 28×28, computed in `dtype`."""
    rows = summary.rows(models.create(network))
    flop, outputs = 0, 0
    for i, row in enumerate(rows):
        if row.kind not in ("Conv", "Dense", "MaxPool"):
            continue
        # Without the biases; a pool has neither.
        kernel = max(0, row.parameters - row.shape[-1])
        # Forwards, and backwards for the kernel and the input; the images need no gradient.
        flop += 2 * kernel * math.prod(row.shape[:-1]) * (2 if i == 0 else 3)
        # Of a pooled convolution only the pool's output has to be kept.
        if not (i + 1 < len(rows) and rows[i + 1].name == f"{row.name}/pool"):
            outputs += math.prod(row.shape)
    parameters = sum(row.parameters for row in rows)
    moved = UPDATE[recipes.config(network).optimizer]
    return Work(flop, 28 * 28 + 4 * jnp.dtype(dtype).itemsize * outputs, 4 * moved * parameters)


def main(argv: list[str] | None = None) -> None:
    parser = suite.parser("limits", __doc__, repetitions=3, seconds=3, dtype=True, networks=True)
    parser.add_argument(
        "--batch-sizes", nargs="+", type=suite.positive(int), help="beside the recipe's own"
    )
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        measured = (profile if "network" in args.measure else ceilings)(**args.measure)
        print(json.dumps(measured))
        return

    origin = hardware.origin(args.device)
    file = args.results / f"limits_{suite.suffix(args.device, args.dtype)}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    results = {}
    for network in args.networks:
        usual = recipes.config(network).batch_size
        sizes = sorted({usual, *(args.batch_sizes or BATCH_SIZES[args.device])})
        results[network] = {
            "device": args.device,
            **origin,
            "batch_size": usual,
            "ceilings": [],
            "work": work(network, args.dtype)._asdict(),
            "images_per_second": {str(size): [] for size in sizes},
        }
    dtype = {"compute_dtype": args.dtype}
    for repetition in range(args.repetitions):
        found = run(args.device, dtype)
        for network in args.networks:
            results[network]["ceilings"].append(found)
            for size, seen in results[network]["images_per_second"].items():
                point = {"batch_size": int(size)} | dtype
                measured = scaling.run(network, args.device, args.seconds, point)
                seen.append(measured["images_per_second"])
                done = f"{repetition + 1}/{args.repetitions}"
                print(
                    f"{done} {network}, {size} images a step: {seen[-1]:,.0f} images/s", flush=True
                )
            if repetition == 0:
                try:
                    results[network]["profile"] = run(args.device, {"network": network} | dtype)
                except UserError as failure:
                    print(f"{failure}\n{network}: goes on without its profile", flush=True)
            # After each network, so that a long run that is stopped keeps what it has.
            have = before | {name: r for name, r in results.items() if r["ceilings"]}
            have = {name: have[name] for name in models.names() if name in have}
            suite.write(have, file, table(have))


def run(device: str, measured: dict) -> dict:
    """What `--measure` gives in a process of its own."""
    variables = {}
    if device == "gpu" and "network" in measured:
        # Of what runs in a CUDA graph the profiler does not say which operation it is.
        flags = os.environ.get("XLA_FLAGS", "")
        variables["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="
    return suite.child("limits", device, f"--measure={json.dumps(measured)}", **variables)


def ceilings(compute_dtype: str) -> dict[str, float]:
    """The fastest product, in FLOP/s, and the fastest copy, in bytes read and written.

    The product is computed as training computes its own: on NVIDIA GPUs float32 in TF32.
    """

    def fastest(run: Callable[[], jax.Array]) -> float:
        seconds = []
        # The first compiles.
        for _ in range(11):
            clock = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - clock)
        return min(seconds)

    on_cpu = jax.default_backend() == "cpu"
    speeds = []
    for n in (1024, 2048, 4096) if on_cpu else (4096, 8192, 16384):
        # Random numbers: with equal ones a GPU takes less power and is faster.
        square = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(compute_dtype))
        product = jax.jit(partial(jnp.dot, preferred_element_type=jnp.float32))
        speeds.append(2 * n**3 / fastest(partial(product, square, square)))
    array = jnp.ones(2**28 if on_cpu else 2**30)
    # Of a new array on CPU the system clears every page, in five times the time.
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copied() -> jax.Array:
        nonlocal array
        array = in_place(array)
        return array

    return {"flop": max(speeds), "bytes": 2 * array.nbytes / fastest(copied)}


def profile(network: str, compute_dtype: str = "float32") -> dict:
    """Microseconds a step by part, and the operations that take most, at the recipe's batch."""
    config = recipes.config(network)
    config.compute_dtype = compute_dtype
    count, shape = 10_000, (28, 28, 1)
    model, tx = parts.create_model(config, 10), parts.create_optimizer(config, count)
    state = parts.initial_state(config, model, tx, shape, parallel.single_mesh())
    rng = np.random.default_rng(0)
    images = jax.device_put(rng.integers(0, 256, (count, *shape), np.uint8))
    labels = jax.device_put(rng.integers(0, 10, count, np.int32))
    on_cpu = jax.default_backend() == "cpu"
    # So many that starting the program does not count.
    made = max(2, 2000 // config.batch_size) if on_cpu else 500
    rows = jax.device_put(rng.integers(0, count, (made, config.batch_size), np.int32))
    epoch = (
        jax.jit(partial(steps.train_epoch, model=model, tx=tx), donate_argnums=0)
        .lower(state, images, labels, rows)
        .compile({"xla_cpu_enable_xprof_traceme": True} if on_cpu else None)
    )
    seconds = []
    for _ in range(5):
        clock = time.perf_counter()
        state, _ = jax.block_until_ready(epoch(state, images, labels, rows))
        seconds.append((time.perf_counter() - clock) / made)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, _ = jax.block_until_ready(epoch(state, images, labels, rows))
        (file,) = Path(folder).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        spent = operations(data, epoch.as_text(), on_gpu=not on_cpu)
    by_part = collections.Counter()
    for (_, op_name), microseconds in spent.items():
        by_part[part(op_name)] += microseconds / made
    largest = [[*names, microseconds / made] for names, microseconds in spent.most_common(5)]
    step = 1e6 * statistics.median(seconds)
    return {"step": step, "parts": by_part, "largest": largest}


def operations(data, program: str, on_gpu: bool) -> collections.Counter:
    """Microseconds of each operation of a program (HLO text), by its name and `op_name`.

    What contains others, such as a loop, is left out. What XLA adds, such as a copy, has an empty
    `op_name`, as has what a GPU does without being named in the program.

    Raises:
        UserError: the profiler saw nothing of the device.
    """
    pattern = r'^ *(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\((?:.*?op_name="([^"]*)")?'
    named = {
        name: op_name
        for name, opcode, op_name in re.findall(pattern, program, re.MULTILINE)
        if opcode not in ("while", "call", "conditional")
    }
    spent = collections.Counter()
    # Beside a GPU's own plane there is one of the host, which starts the same kernels.
    planes = [p for p in data.planes if not on_gpu or p.name.startswith("/device:GPU")]
    for plane in planes:
        # A GPU's kernels lie on its streams; further lines would sum them up once more.
        for line in (n for n in plane.lines if not on_gpu or n.name.startswith("Stream")):
            for event in line.events:
                name = dict(event.stats).get("hlo_op") or event.name
                if on_gpu or name in named:
                    spent[name, named.get(name, "")] += event.duration_ns / 1000
    if not spent:
        raise UserError("the profiler recorded nothing of the device")
    return spent


def part(op_name: str) -> str:
    """The one of `PARTS` that an operation belongs to, by the scopes in its name."""
    scopes = {"optimizer": "optimizer", "gather_batch": "gather", "transpose(": "backward"}
    found = (name for scope, name in scopes.items() if scope in op_name)
    return next(found, "forward" if "jvp(" in op_name else "other")


def table(results: dict[str, dict]) -> str:
    """Shares of the ceilings, and of a step's parts, as Markdown."""
    lines = [
        "| network (batch) | images/s (lowest to highest) | GFLOP/s | GB/s | bound by "
        "| share of the limit |",
        "|---|---|---|---|---|---|",
    ]
    shares = [
        "",
        f"| network | {' | '.join(PARTS)} | µs a step, one device |",
        "|" + "---|" * (len(PARTS) + 2),
    ]
    conditions = {}
    for network, result in results.items():
        turns = result["ceilings"]
        flop, moved = (statistics.median(turn[key] for turn in turns) for key in ("flop", "bytes"))
        needed = Work(**result["work"])
        for batch, speeds in result["images_per_second"].items():
            speed = statistics.median(speeds)
            image_bytes = needed.image_bytes + needed.step_bytes / int(batch)
            by_flop, by_bytes = needed.flop / flop, image_bytes / moved
            lines.append(
                f"| `{network}` ({batch}) | {suite.spread(speeds)} "
                f"| {needed.flop * speed / 1e9:,.1f} | {image_bytes * speed / 1e9:,.1f} "
                f"| {'FLOP' if by_flop > by_bytes else 'bytes'} "
                f"| {max(by_flop, by_bytes) * speed:.0%} |"
            )
        if profiled := result.get("profile"):
            found, step = dict(profiled["parts"]), profiled["step"]
            if result["device"] == "gpu":
                # On CPU threads overlap.
                batch = result["batch_size"]
                step = 1e6 * batch / statistics.median(result["images_per_second"][str(batch)])
                found["idle"] = max(0, step - sum(found.values()))
            total = sum(found.values())
            cells = " | ".join(f"{found.get(name, 0) / total:.0%}" for name in PARTS)
            shares.append(f"| `{network}` | {cells} | {step:,.0f} |")
        conditions[network] = (
            f"Ceilings: {flop / 1e9:,.0f} GFLOP/s in a product, {moved / 1e9:,.1f} GB/s in a copy. "
            f"Medians of {len(turns)} turns; {suite.conditions(result)}"
        )
    lines += shares
    for line in suite.grouped(conditions):
        lines += ["", line]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
