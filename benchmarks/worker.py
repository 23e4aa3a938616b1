"""The process in which one peer trains; `benchmarks.throughput` starts it and gives the turns.

    python -m benchmarks.worker FOLDER MODULE VARIANT STARTED

FOLDER holds job.json and data.npz; STARTED is the Unix time of the command. It prints a JSON line
when the first step is done, one for each line of seconds that it reads ("3.0"), and one at the
end of its input.
"""

import importlib
import json
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.peers import Data, Job


def main() -> None:
    folder, module, variant, started = sys.argv[1:]
    job = Job(**json.loads(Path(folder, "job.json").read_text()))
    with np.load(Path(folder, "data.npz")) as arrays:
        data = Data(**arrays)
    create = importlib.import_module(f"benchmarks.peers.{module}").create

    clock = time.perf_counter()
    peer = create(job, data, variant)
    building = time.perf_counter() - clock
    steps, first = peer.train(1)
    ready = time.time() - float(started)

    made, seconds = peer.train(1)
    # One call that is long may have prepared the next ones, as CUDA graphs are captured.
    while seconds < 0.5 or made == 1:
        made, seconds = peer.train(2 * made)
    # Peers make several steps at a time; the first ended when the others had not begun. A step took
    # its share of the same call, where nothing was compiled in it.
    step = min(first / steps, seconds / made)
    say(
        parameters=peer.parameters,
        first_step_seconds=ready - (steps - 1) * step,
        compile_seconds=building + first - steps * step,
    )
    for line in sys.stdin:
        made, seconds = peer.train(max(1, round(float(line) * made / seconds)))
        say(images_per_second=made * job.batch_size / seconds)
    memory = peer.device_memory()
    say(
        loss_after=peer.loss(),
        peak_memory_mib=peak_memory() / 2**20,
        device_memory_mib=None if memory is None else memory / 2**20,
    )


# Bytes in the unit of `ru_maxrss`.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_memory() -> int:
    """Bytes that this process had in memory at most."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        # It may begin with what the parent had.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
