"""The process in which one peer trains; `benchmarks.throughput` starts it and gives the turns.

    python -m benchmarks.worker FOLDER MODULE VARIANT STARTED

FOLDER holds job.json and data.npz; STARTED is the Unix time of the command. It prints a JSON line
when the first step is done, one for each line of seconds that it reads ("3.0"), and one at the
end of its input.
"""

import importlib
import json
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
    steps, _ = peer.train(1)
    building, ready = time.perf_counter() - clock, time.time() - float(started)
    loss_before = peer.loss()

    made, seconds = peer.train(1)
    while seconds < 0.5:
        made, seconds = peer.train(2 * made)
    # Peers make several steps at a time; the first ended when the others had not begun.
    rest = (steps - 1) * seconds / made
    say(
        parameters=peer.parameters,
        first_step_seconds=ready - rest,
        compile_seconds=building - steps * seconds / made,
        loss_before=loss_before,
    )
    for line in sys.stdin:
        made, seconds = peer.train(max(1, round(float(line) * made / seconds)))
        say(images_per_second=made * job.batch_size / seconds)
    say(
        loss_after=peer.loss(),
        peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        device_memory_mib=(memory := peer.device_memory()) and memory / 2**20,
    )


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
