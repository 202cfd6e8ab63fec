"""What does an all-reduce of a step cost between rank processes on this machine, and by gloo alone?

Run: ``python -m benchmarks.all_reduce --ranks 3 --hidden 576 [--json]``. Microseconds per call, medians of
bursts of 60 (a step of 30 layers), with nothing computed between the calls. Both ways in one run.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import FileStore, ProcessGroupGloo  # type: ignore[attr-defined]

from protocol.topology import Topology
from worker.comm import GlooCommunicator

BURST = 60


def median_us(call: Callable[[], object], bursts: int) -> float:
    """Return the median over bursts of one call's microseconds."""
    times = []
    for _ in range(bursts):
        began = time.perf_counter()
        for _ in range(BURST):
            call()
        times.append((time.perf_counter() - began) / BURST * 1e6)
    return sorted(times)[bursts // 2]


def measure(rank: int, ranks: int, hidden: int, bursts: int, directory: str) -> list[dict[str, float]]:
    """Return one rank's table."""
    torch.set_num_threads(1)
    comm = GlooCommunicator.connect(Topology(tp=ranks), rank, f"{directory}/rendezvous", 60.0)
    options = ProcessGroupGloo._Options()  # noqa: SLF001
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]  # noqa: SLF001
    options._timeout = timedelta(seconds=60)  # noqa: SLF001
    options._threads = 1  # noqa: SLF001
    gloo = ProcessGroupGloo(FileStore(f"{directory}/gloo", ranks), rank, ranks, options)
    table = []
    for rows in (1, 16, 64, 512):
        x = torch.zeros(rows, hidden)
        comm.barrier()
        window_us = median_us(lambda x=x: comm.all_reduce(x), bursts)
        comm.barrier()
        gloo_us = median_us(lambda x=x: gloo.allreduce([x]).wait(), max(bursts // 4, 1))
        table.append(
            {"rows": rows, "window_us": window_us, "gloo_us": gloo_us, "ratio": gloo_us / window_us}
        )
    comm.barrier()
    comm.close()
    return table


def main() -> None:
    """Fork the ranks; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--bursts", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        others = []
        for rank in range(1, asked.ranks):
            pid = os.fork()
            if pid == 0:
                measure(rank, asked.ranks, asked.hidden, asked.bursts, directory)
                os._exit(0)
            others.append(pid)
        table = measure(0, asked.ranks, asked.hidden, asked.bursts, directory)
        for pid in others:
            os.waitpid(pid, 0)
    if asked.json:
        print(json.dumps({"ranks": asked.ranks, "hidden": asked.hidden, "table": table}))
        return
    print(f"{asked.ranks} ranks, float32 [rows, {asked.hidden}], {os.cpu_count()} cores")
    print("rows    window us    gloo us   gloo/window")
    for line in table:
        print("{rows:4}   {window_us:10.1f} {gloo_us:10.1f} {ratio:10.1f}".format(**line))


if __name__ == "__main__":
    main()
