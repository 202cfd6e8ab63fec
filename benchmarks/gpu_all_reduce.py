"""What does an all-reduce cost inside a CUDA graph, by each way, and fused with residual + RMSNorm?

Run: ``python -m benchmarks.gpu_all_reduce --ranks 2 [--kernels DIRECTORY] [--json PATH]``. Ranks take a GPU
each where there are enough; else they share, and the figures are those of time slices: right, and useless
as times. Microseconds a call, medians over replays of rank 0, beside those of NCCL and of one-shot over
symmetric memory on two H200. A message longer than a launch takes goes in pieces.
"""

import argparse
import json
import os
import statistics
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from protocol.abort_page import make_page
from protocol.topology import Topology
from worker.backends.cuda.comm import CudaCommunicator
from worker.backends.cuda.comm_ipc import IpcGroup
from worker.backends.cuda.comm_nccl import NCCL_FROM_BYTES
from worker.backends.cuda.compiler import KernelCache
from worker.backends.cuda.launch import Kernels

SIZES = (8 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20, 32 << 20, 64 << 20)
HIDDEN = 4096
EPS = 1e-5
MEASURED_NCCL_US = {8 << 10: 11.6, 64 << 10: 12.2, 256 << 10: 13.6, 1 << 20: 18.8, 8 << 20: 51.0}
MEASURED_ONE_SHOT_US = {8 << 10: 6.5, 64 << 10: 6.7, 256 << 10: 8.4, 1 << 20: 13.3}

Table = list[dict[str, float]]


def median_us(comm: CudaCommunicator, call: Callable[[], object], burst: int, replays: int) -> float:
    """Return the median over replays of a graph of ``burst`` calls, for one call."""
    call()  # whatever is taken or tuned at a first call is so outside the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(burst):
            call()
    times = []
    for _ in range(replays + 2):
        comm.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / burst)
    comm.check()
    return statistics.median(times[2:])


def measure(
    rank: int, ranks: int, directory: str, page_fd: int, kernels: str, burst: int, replays: int
) -> Table:
    """Return one rank's table."""
    count = torch.cuda.device_count()
    torch.cuda.set_device(rank % count)
    torch.empty(1, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    cache = KernelCache(Path(kernels), f"sm_{major}{minor}a")
    has_own = count >= ranks
    comm = CudaCommunicator.connect(
        Topology(tp=ranks),
        rank,
        f"{directory}/rendezvous",
        60.0,
        Kernels(cache),
        page_fd=page_fd,
        nccl_bytes=max(max(SIZES), NCCL_FROM_BYTES) if has_own else 0,
    )
    group, nccl = comm._group, comm._nccl  # noqa: SLF001  # each way by itself, whatever the size
    assert isinstance(group, IpcGroup)
    if not has_own:
        burst, replays = 2, 5
    table: Table = []
    for size in SIZES:
        x = torch.zeros(size // (2 * HIDDEN), HIDDEN, dtype=torch.bfloat16, device="cuda")
        residual, weight = torch.zeros_like(x), torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
        ways: dict[str, Callable[[], object]] = {
            "one_shot_us": lambda x=x: group.all_reduce_one_shot(x),
            "two_shot_us": lambda x=x: group.all_reduce_two_shot(x),
        }
        if nccl is not None:
            ways["nccl_us"] = lambda x=x: nccl.all_reduce(x)
        if group.fuses(x):
            ways["fused_us"] = lambda x=x, r=residual, w=weight: group.all_reduce_norm(x, r, w, EPS)
        line: dict[str, float] = {"bytes": size}
        line |= {name: median_us(comm, call, burst, replays) for name, call in ways.items()}
        table.append(line)
    comm.barrier()
    comm.close()
    return table


def report(table: Table, ranks: int, where: str) -> None:
    """Print measured, ceiling, ratio."""
    print(f"{ranks} ranks, {where}, bf16 [rows, {HIDDEN}], µs a call inside a CUDA graph")
    print(
        f"{'bytes':>9} {'one-shot':>9} {'two-shot':>9} {'NCCL':>9} {'fused':>9}   best/NCCL  best/symmetric"
    )
    for line in table:
        size = int(line["bytes"])
        cells = [line.get(name) for name in ("one_shot_us", "two_shot_us", "nccl_us", "fused_us")]
        best = min(line["one_shot_us"], line["two_shot_us"])
        ratios = [
            best / known[size] if size in known else None
            for known in (MEASURED_NCCL_US, MEASURED_ONE_SHOT_US)
        ]
        shown = [f"{'-' if cell is None else f'{cell:.1f}':>9}" for cell in cells]
        shown += [f"{'-' if ratio is None else f'{ratio:.2f}':>11}" for ratio in ratios]
        print(f"{size:>9} " + " ".join(shown))


def main() -> None:
    """Fork the ranks, before any of them has a context; this process only collects."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    kernels = str(Path.home() / ".cache" / "tandem" / "kernels")
    parser.add_argument("--kernels", default=kernels, help="the cache of compiled kernels")
    parser.add_argument("--burst", type=int, default=50, help="calls in a graph")
    parser.add_argument("--replays", type=int, default=21)
    parser.add_argument("--json", metavar="PATH")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory, "table.json")
        page_fd = make_page()
        children = []
        for rank in range(asked.ranks):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    table = measure(
                        rank, asked.ranks, directory, page_fd, asked.kernels, asked.burst, asked.replays
                    )
                    if rank == 0:
                        where = torch.cuda.get_device_name()
                        has_own = torch.cuda.device_count() >= asked.ranks
                        found.write_text(json.dumps({"table": table, "device": where, "has_own": has_own}))
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(pid)
        statuses = [os.waitpid(pid, 0)[1] for pid in children]
        if any(statuses):
            raise SystemExit(f"ranks ended with {statuses}")
        facts = json.loads(found.read_text())
    where = facts["device"] + (" each" if facts["has_own"] else " shared: no times to go by")
    report(facts["table"], asked.ranks, where)
    if asked.json:
        Path(asked.json).write_text(json.dumps({"ranks": asked.ranks, **facts}, indent=1))


if __name__ == "__main__":
    main()
