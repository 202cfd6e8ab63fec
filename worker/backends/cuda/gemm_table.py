"""Which of cuBLASLt's algorithms multiplies which shape: measured once on a machine, and kept.

``tandem warm --model`` measures, a boot reads. What was not measured is left to cuBLAS's own choice.
"""

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import torch

from protocol.errors import StorageError
from worker.backends.cuda.cublaslt import Algorithm, CublasLt
from worker.backends.cuda.graphs import LADDER, ladder
from worker.backends.cuda.pieces import SIZES

LARGE_ROWS = (1536, 2048, 3072, 4096, 5120, 6144, 7168, 8448)
_BYTES_APART = 256 << 20
"""Weights are read in turn from so many bytes, several times the L2 cache."""
_ROUNDS, _ROUND_US = 5, 1000.0
_CLEARLY = 0.985
"""What another algorithm's time must be of the favourite's to be worth keeping."""


class Measured(msgspec.Struct, frozen=True):
    """One line of the table."""

    rows: int
    outputs: int
    k: int
    dtype: str
    words: tuple[int, ...]
    workspace_bytes: int


def table_path(kernel_cache: Path, gpu: str, version: int) -> Path:
    """Return where the table of a GPU kind and a library version is kept."""
    return kernel_cache / f"gemm-{''.join(c if c.isalnum() else '-' for c in gpu)}-{version}.json"


class GemmTable:
    """The choices of one machine, by shape and then by rows."""

    def __init__(self, lines: Iterable[Measured]) -> None:
        self._rows: dict[tuple[int, int, str], list[int]] = {}
        self._found: dict[tuple[int, int, str, int], Algorithm] = {}
        for line in sorted(lines, key=lambda line: line.rows):
            key = (line.outputs, line.k, line.dtype)
            self._rows.setdefault(key, []).append(line.rows)
            self._found[(*key, line.rows)] = Algorithm(line.words, line.workspace_bytes)

    def get(self, rows: int, outputs: int, k: int, dtype: torch.dtype) -> Algorithm | None:
        """Return what serves a shape: what was measured for the next number of rows."""
        key = (outputs, k, str(dtype))
        measured = self._rows.get(key)
        if measured is None:
            return None
        place = min(bisect_left(measured, rows), len(measured) - 1)
        return self._found[(*key, measured[place])]


def read(path: Path) -> list[Measured]:
    """Return the lines of a table; one that is not there, or is none, has none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Measured])
    except (OSError, msgspec.DecodeError):
        return []


def measure(
    lt: CublasLt, shapes: Iterable[tuple[int, int, torch.dtype]], max_rows: int
) -> Iterator[Measured]:
    """Measure each (outputs, k, dtype of the result) at every number of rows that is launched."""
    sizes = sorted({*ladder(max_rows, LADDER), *SIZES, *LARGE_ROWS})
    for outputs, k, dtype in shapes:
        copies = max(_BYTES_APART // (outputs * k * 2), 2)
        weights = [torch.randn(outputs, k, device="cuda").to(torch.bfloat16) for _ in range(copies)]
        for rows in sizes:
            if dtype == torch.float32 and rows > max_rows:
                continue
            best = _fastest(lt, rows, weights, dtype)
            yield Measured(rows, outputs, k, str(dtype), best.words, best.workspace_bytes)
        del weights


def write(path: Path, lines: list[Measured]) -> None:
    """Write a table. Errors: ``StorageError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(".new")
        made.write_bytes(msgspec.json.encode(lines))
        made.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from None


def _fastest(lt: CublasLt, rows: int, weights: list[torch.Tensor], dtype: torch.dtype) -> Algorithm:
    outputs, k = weights[0].shape
    x = torch.randn(rows, k, device="cuda").to(torch.bfloat16)
    out = torch.empty(rows, outputs, dtype=dtype, device="cuda")
    candidates = [
        one for one in lt.proposals(rows, outputs, k, dtype) if lt.multiply(x, weights[0], out, one)
    ]
    torch.cuda.synchronize()
    repeats = max(min(int(_ROUND_US / max(_time_us(lt, x, weights, out, candidates[0], 3), 1.0)), 20), 1)
    # In rounds, so that a clock that falls meanwhile falls for all of them.
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(_ROUNDS):
        for place, candidate in enumerate(candidates):
            times[place].append(_time_us(lt, x, weights, out, candidate, repeats))
    medians = [statistics.median(of) for of in times]
    place = min(range(len(candidates)), key=medians.__getitem__)
    return candidates[place if medians[place] < _CLEARLY * medians[0] else 0]


def _time_us(
    lt: CublasLt,
    x: torch.Tensor,
    weights: list[torch.Tensor],
    out: torch.Tensor,
    algorithm: Algorithm,
    repeats: int,
) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    for turn in range(repeats):
        lt.multiply(x, weights[turn % len(weights)], out, algorithm)
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) * 1e3 / repeats
