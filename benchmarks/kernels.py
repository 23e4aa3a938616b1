"""Kernels of a training step on an NVIDIA H200, counted in the program that XLA compiles for one.

    python -m benchmarks.kernels

No GPU is needed, but `pip install "jax[cuda12]"`. Steps of these networks are so short that on a
GPU their time goes with the number of kernels. Without a GPU XLA does not try out which matrix
products and convolutions are fastest, so that on one a few kernels more or fewer may be made.
"""

import collections
import re
from functools import partial

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import hardware, recipes, suite
from mnist_flax import cli, epochs, parallel, parts, steps
from mnist_flax.errors import UserError

STEPS = 10
# The computation's dtype and the number of seeds.
KINDS = {
    "float32": ("float32", 1),
    "bfloat16": ("bfloat16", 1),
    "float32, ten seeds": ("float32", 10),
}

# XLA's GpuTargetConfigProto; the numbers are NVIDIA's of the H200 (SXM).
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
  device_memory_size: 151000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H200"
"""

# What of a program is no kernel.
_NO_KERNEL = {"bitcast", "constant", "get-tuple-element", "iota", "parameter", "tuple"}


def main(argv: list[str] | None = None) -> None:
    parser = suite.parser("kernels", __doc__, repetitions=None, device=False, networks=True)
    args = parser.parse_args(argv)
    # Where there is no GPU, JAX would look for one in vain, and then know of no CUDA.
    jax.config.update("jax_platforms", "cpu")
    # What was compiled for a device that is not there cannot be loaded again.
    jax.config.update("jax_enable_compilation_cache", False)
    device = h200()
    counts = {
        network: {name: count(compiled(network, *kind, device)) for name, kind in KINDS.items()}
        for network in args.networks
    }
    result = hardware.origin("cpu") | {"hardware": "NVIDIA H200", "kernels": counts}
    text = table(result)
    suite.write(result, args.results / "kernels_gpu.json", text)
    print(text)


def h200() -> jax.Device:
    """A device to compile for, which need not be there.

    Raises:
        UserError: JAX has no plugin for CUDA.
    """
    try:
        topology = topologies.get_topology_desc(
            "h200", platform="cuda", target_config=H200, topology="1x1x1"
        )
    except RuntimeError as error:
        raise UserError(
            f"JAX cannot compile for CUDA ({str(error).splitlines()[0]}): "
            'run `pip install "jax[cuda12]"`'
        ) from error
    return topology.devices[0]


def compiled(network: str, dtype: str, seeds: int, device: jax.Device) -> str:
    """The text of a run's training program, of `STEPS` steps at the recipe's batch size."""
    settings = recipes.config(network)
    settings.compute_dtype, settings.num_seeds = dtype, seeds
    model = parts.create_model(settings, num_classes=10)
    tx = parts.create_optimizer(settings, 60_000)
    epoch = partial(steps.train_epoch, model=model, tx=tx)
    mesh = Mesh(np.array([[device]]), (parallel.SEEDS, parallel.BATCH))
    shape = jax.ShapeDtypeStruct
    traced = epochs.jit_epoch(epoch, mesh, seeds=seeds, donate=True).trace(
        parts.abstract_state(settings, model, tx, (28, 28, 1), mesh),
        shape((60_000, 28, 28, 1), np.uint8),
        shape((60_000,), np.int32),
        shape((STEPS, seeds, settings.batch_size), np.int32),
    )
    lowered = traced.lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()


def count(program: str) -> dict[str, int]:
    """The kernels in the loop over the steps: of convolutions, of matrix products, of the rest."""
    trips = rf'known_trip_count":{{"n":"{STEPS}"'
    loop = re.search(rf"while\(.*body=%?([\w.-]+).*{trips}", program)
    if loop is None:
        raise SystemExit(f"this version of XLA names no loop of {STEPS} steps")
    body = re.escape(loop[1])
    lines = re.search(rf"^%?{body} .*?^}}", program, re.MULTILINE | re.DOTALL)[0]
    kinds = collections.Counter(convolutions=0, products=0, others=0)
    for line in lines.splitlines():
        operation = re.search(r"= (?:\(.*?\)|\S+) ([\w-]+)\(", line)
        if not operation or operation[1] in _NO_KERNEL:
            continue
        if "__cudnn$conv" in line:
            kinds["convolutions"] += 1
        elif re.search(r"calls=%?gemm_fusion|__cublas", line):
            kinds["products"] += 1
        else:
            kinds["others"] += 1
    return dict(kinds)


def table(result: dict) -> str:
    """The counts as Markdown, a network a line."""
    lines = ["| network | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for network, found in result["kernels"].items():
        cells = [
            f"{sum(kinds.values())} ({kinds['convolutions']} + {kinds['products']})"
            for kinds in found.values()
        ]
        lines.append(f"| `{network}` | {' | '.join(cells)} |")
    lines += [
        "",
        "Kernels a step (of cuDNN's convolutions + of matrix products) at the recipe's batch size; "
        f"compiled, not run, for {suite.conditions(result)}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
