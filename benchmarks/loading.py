"""Reading a checkpoint into host memory: ours beside what others use, same files, one run.

    python -m benchmarks.loading DIR [--tp N] [--rounds N] [--json FILE]

Each line is a process of its own, which imports first and is timed after that: ``whole`` is every tensor,
``slice`` what one rank of ``--tp`` holds. Cold: the files' pages are dropped before each. Ceilings are
plain parallel reads of as many bytes into fresh memory, with the best of several numbers of threads. Those
who have no slices read whole tensors and cut them. safetensors maps what it loads whole, so that warm it
copies nothing. Run it on a quiet machine: the answer of a busy one is about its neighbours.
"""

import argparse
import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.figures import Demand, Figure, as_data, table
from loader.index import Checkpoint, check_against, read_index
from loader.plan import plan_load
from loader.reader import load
from loader.source import Source
from models.registry import load_spec
from models.spec import ModelSpec
from protocol.topology import Topology

OURS = "tandem"
PLAIN_THREADS = (1, 2, 4, 8, 16, 32)
_BLOCK = 4 << 20
_PAGE = 4096
_STATUS = Path("/proc/self/status")
Work = Callable[[], tuple[int, object]]
"""Loads; returns the bytes that are then in memory, and what holds them: to free them takes time too."""


class MissingError(Exception):
    """A loader that cannot run here, and why."""


class Case:
    """A checkpoint, and what one rank of it holds."""

    def __init__(self, directory: Path, tp: int) -> None:
        self.tp = tp
        self.topology = Topology(tp=tp)
        self.checkpoint: Checkpoint = read_index(directory)
        dtype = {"BF16": "bfloat16", "F32": "float32"}[next(iter(self.checkpoint.tensors.values())).dtype]
        self.spec: ModelSpec = load_spec(directory, dtype)
        check_against(self.spec, self.checkpoint)
        self.paths = [file.path for file in self.checkpoint.files]

    def slices(self) -> dict[str, list[tuple[int, int, int]]]:
        """Return what rank 0 holds of each tensor: (dimension, start, end)."""
        found: dict[str, list[tuple[int, int, int]]] = {}
        for parameter in self.spec.parameters:
            for piece in parameter.pieces(self.topology, 0):
                found.setdefault(piece.source, []).append((piece.dim, piece.start, piece.end))
        return found


def ours(case: Case) -> Work:
    """One rank's part of the plan; pieces of other ranks' go to their arenas."""
    stages = (range(case.spec.num_layers),)

    def work() -> tuple[int, object]:
        plan = plan_load(case.spec, case.checkpoint, case.topology, stages, only=0)
        arenas = {rank: memoryview(_memory_of(size)) for rank, size in enumerate(plan.arena_bytes)}
        report = load(plan, 0, arenas)
        print(report, file=sys.stderr)
        return report.bytes, arenas

    return work


def _memory_of(size: int) -> mmap.mmap:
    """Return memory as a rank's arena is: a memfd's, not there before it is written to."""
    fd = os.memfd_create("arena")
    os.ftruncate(fd, size)
    try:
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


def _keep(case: Case, tensor_of: Callable[[str], Any]) -> tuple[int, object]:
    """Cut tensors as a rank holds them; whole ones are touched, as some loaders only map them."""
    kept, size = [], 0
    for name, cuts in case.slices().items():
        tensor = tensor_of(name)
        for dim, start, end in cuts:
            part = tensor.narrow(dim, start, end - start)
            if case.tp > 1:
                part = part.clone()
            kept.append(part)
            size += part.numel() * part.element_size()
            flat = part.reshape(-1)
            flat[:: _PAGE // part.element_size()].sum()
    return size, kept


def safetensors(case: Case) -> Work:
    """``load_file`` for all; ``get_slice`` for a rank's part."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    def whole() -> tuple[int, object]:
        tensors = {k: v for path in case.paths for k, v in load_file(path).items()}
        return _keep(case, tensors.__getitem__)

    def sliced() -> tuple[int, object]:
        size, kept = 0, []
        opened = [safe_open(path, "pt") for path in case.paths]
        for name, cuts in case.slices().items():
            view = opened[case.checkpoint.tensors[name].file].get_slice(name)  # type: ignore[no-untyped-call]
            for dim, start, end in cuts:
                part = view[(slice(None),) * dim + (slice(start, end),)].clone()
                kept.append(part)
                size += part.numel() * part.element_size()
        return size, kept

    return whole if case.tp == 1 else sliced


def fastsafetensors(case: Case) -> Work:
    """All files in one buffer, threads and bounce buffers as it has them by default."""
    from fastsafetensors import SafeTensorsFileLoader  # type: ignore[import-not-found]

    def work() -> tuple[int, object]:
        loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
        loader.add_filenames({0: case.paths})
        buffers = loader.copy_files_to_device()
        size, kept = _keep(case, buffers.get_tensor)
        return size, (kept, buffers, loader)

    return work


def runai(case: Case) -> Work:
    """Streams tensors in the order in which they come; each is copied before the next."""
    from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found]

    def work() -> tuple[int, object]:
        wanted, size, kept = case.slices(), 0, []
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(case.paths)
            for name, tensor in streamer.get_tensors():
                for dim, start, end in wanted.get(name, ()):
                    part = tensor.narrow(dim, start, end - start).clone()
                    kept.append(part)
                    size += part.numel() * part.element_size()
        return size, kept

    return work


def instanttensor(_case: Case) -> Work:
    """Reads into CUDA memory alone."""
    import torch
    from instanttensor import safe_open as _installed  # type: ignore[import-not-found]  # noqa: F401

    if not torch.cuda.is_available():
        raise MissingError("loads to CUDA devices only, and there is none")
    raise MissingError("its figures belong beside a load to the device, not to host memory")


def plain(case: Case, threads: int, *, is_cold: bool) -> Work:
    """The ceiling: blocks of one rank's share of the files, read in order by threads."""
    jobs = []
    for file, path in enumerate(case.paths):
        size = case.checkpoint.files[file].size
        share = size // case.tp // _BLOCK * _BLOCK or min(size, _BLOCK)
        jobs += [(path, at) for at in range(0, share, _BLOCK)]

    def work() -> tuple[int, object]:
        memory = memoryview(_memory_of(len(jobs) * _BLOCK))
        sources = {path: Source(path) for path in case.paths}
        queue, done = list(enumerate(jobs))[::-1], []

        def read() -> None:
            while queue:
                try:
                    index, (path, at) = queue.pop()
                except IndexError:
                    return
                source = sources[path]
                fd = source.direct_fd if is_cold and source.direct_fd is not None else source.fd
                done.append(os.preadv(fd, [memory[index * _BLOCK : (index + 1) * _BLOCK]], at))

        crew = [threading.Thread(target=read) for _ in range(threads)]
        for one in crew:
            one.start()
        for one in crew:
            one.join()
        return sum(done), memory

    return work


LOADERS: dict[str, Callable[[Case], Work]] = {
    OURS: ours,
    "safetensors": safetensors,
    "fastsafetensors": fastsafetensors,
    "runai-model-streamer": runai,
    "instanttensor": instanttensor,
}


def drop_pages(paths: list[str]) -> bool:
    """Drop files from the page cache; return whether that worked (tmpfs keeps its pages)."""
    cold = True
    for path in paths:
        source = Source(path)
        os.fsync(source.fd)
        os.posix_fadvise(source.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        cold = cold and not source.is_cached(0)
        source.close()
    return cold


def warm_pages(paths: list[str]) -> None:
    """Read files into the page cache."""
    buffer = bytearray(_BLOCK)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def child(directory: Path, name: str, tp: int, state: str) -> None:
    """Time one load in this process and print it as JSON."""
    case = Case(directory, tp)
    try:
        if name.startswith("plain-"):
            work = plain(case, int(name.removeprefix("plain-")), is_cold=state == "cold")
        else:
            work = LOADERS[name](case)
    except (ImportError, MissingError) as error:
        print(json.dumps({"missing": str(error)}))
        return
    if state == "cold":
        if not drop_pages(case.paths):
            print(json.dumps({"missing": "files that cannot be dropped from the page cache (tmpfs)"}))
            return
    else:
        warm_pages(case.paths)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    cpu, began = _cpu_s(), time.monotonic()
    size, _held = work()
    spent = time.monotonic() - began
    print(
        json.dumps(
            {
                "bytes": size,
                "seconds": spent,
                "cpu_s": _cpu_s() - cpu,
                "peak_bytes": _memory("VmHWM") - before,
            }
        )
    )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _memory(name: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) << 10


def measure(directory: Path, tp: int, rounds: int) -> tuple[list[Figure], dict[str, str]]:
    """Return the figures, and what is missing and why."""
    figures: list[Figure] = []
    missing: dict[str, str] = {}
    names = [*(f"plain-{threads}" for threads in PLAIN_THREADS), *LOADERS]
    for state in ("cold", "warm"):
        for what, degree in (("whole", 1), (f"slice of tp {tp}", tp)):
            runs: dict[str, list[dict[str, Any]]] = {}
            for turn in range(rounds):
                # Nobody is always the first after the same neighbour.
                for name in names[turn:] + names[:turn]:
                    found = _run(directory, name, degree, state)
                    if "missing" in found:
                        missing[name] = found["missing"]
                    else:
                        runs.setdefault(name, []).append(found)
            figures += _figures(f"{state} {what}", runs)
    return figures, missing


def _run(directory: Path, name: str, tp: int, state: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.loading", str(directory), "--child", name]
    done = subprocess.run(
        [*command, "--tp", str(tp), "--state", state], capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        return {"missing": done.stderr.strip().splitlines()[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _figures(title: str, runs: dict[str, list[dict[str, Any]]]) -> list[Figure]:
    def rate(run: dict[str, Any]) -> float:
        return float(run["bytes"] / run["seconds"] / 1e9)

    rates = {name: statistics.median(map(rate, found)) for name, found in runs.items()}
    plains = [value for name, value in rates.items() if name.startswith("plain-")]
    ceiling = max(plains, default=None)
    figures = []
    for name, found in runs.items():
        if name.startswith("plain-") and rates[name] != ceiling:
            continue
        shown = f"{title}, {name}"
        samples = [rate(run) for run in found]
        demand = Demand(ceiling=ceiling)
        figures += [
            Figure(
                name=shown,
                value=rates[name],
                unit="GB/s",
                higher_is_better=True,
                samples=samples,
                demand=demand,
            ),
            Figure(name=shown, value=statistics.median(run["seconds"] for run in found), unit="s"),
            Figure(name=shown, value=statistics.median(run["cpu_s"] for run in found), unit="CPU s"),
            Figure(name=shown, value=max(run["peak_bytes"] for run in found) / (1 << 30), unit="GiB peak"),
        ]
    return figures


def main() -> None:
    """Measure and print, or (``--child``) be one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--state", choices=["cold", "warm"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.directory, options.child, options.tp, options.state)
        return
    figures, missing = measure(options.directory, options.tp, options.rounds)
    print(table(figures))
    for name, why in missing.items():
        print(f"{name} is missing: {why}")
    if options.json:
        facts = {
            "tp": options.tp,
            "load": os.getloadavg(),
            "missing": missing,
        }
        options.json.write_bytes(as_data(figures, facts))


if __name__ == "__main__":
    main()
