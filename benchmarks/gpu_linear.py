"""Which product kernel is the fastest for few rows, shape by shape, and how near it comes to reading alone?

Run on an idle GPU: ``python -m benchmarks.gpu_linear [--json PATH]``. Shapes are Llama-3-8B's. Every
time is that of one launch in replays of a CUDA graph of 32, over eight copies of the weights, which no
cache holds: ``alone``, product after product, and ``behind``, each after the norm of its input, as in a
decode step. The choice goes by ``behind``, norm included. Prints the choices as ``MEASURED`` of
worker/backends/cuda/linear_table.py has them.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.graph_time import launch_us
from benchmarks.llama_8b_on_h200 import READ_BYTES_S
from worker.backends.cuda.compiler import KernelCache
from worker.backends.cuda.elementwise import Elementwise
from worker.backends.cuda.launch import Kernels
from worker.backends.cuda.linear import Linear
from worker.backends.cuda.linear_table import CUBLAS, GATED, GEMV_ROWS, PLAIN, Choice, column_tiles

ROWS = (1, 2, 4, 8, 16, 24, 32, 64)
COPIES = 8
LAUNCHES = 32
AHEAD_MIB = (4, 16, 32)
"""Tried on the kernels that are the fastest without."""
FINALISTS = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """One product of a layer; gated: with [gate | up], SwiGLU included."""

    name: str
    outputs: int
    k: int
    is_gated: bool = False
    out_dtype: torch.dtype = torch.bfloat16
    known_us: float | None = None
    """At one row, the best seen elsewhere on an H200."""

    @property
    def weight_rows(self) -> int:
        """Rows of the weight."""
        return self.outputs * (2 if self.is_gated else 1)

    @property
    def ceiling_us(self) -> float:
        """Microseconds to read the weights."""
        return self.weight_rows * self.k * 2 / READ_BYTES_S * 1e6


SHAPES = (
    Shape("qkv", 6144, 4096, known_us=14.3),
    Shape("o", 4096, 4096, known_us=10.6),
    Shape("gate_up", 28672, 4096, known_us=56.2),
    Shape("gate_up+swiglu", 14336, 4096, is_gated=True),
    Shape("down", 4096, 14336, known_us=29.7),
    Shape("lm_head", 128256, 4096, out_dtype=torch.float32, known_us=234.6),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One kernel at one place of the table."""

    shape: str
    rows: int
    choice: Choice
    alone_us: float
    behind_us: float
    gb_s: float
    """Of weights, alone."""
    of_reading: float
    """What part of the read ceiling that is."""


class Bench:
    """Owner of the kernels and of the weights of one shape at a time."""

    def __init__(self, kernel_cache: Path) -> None:
        torch.zeros(1, device="cuda")
        major, minor = torch.cuda.get_device_capability()
        suffix = "a" if major >= 9 else ""
        kernels = Kernels(KernelCache(kernel_cache, f"sm_{major}{minor}{suffix}"))
        self.linear, self.elementwise = Linear(kernels), Elementwise(kernels)
        self.best_gate_up: dict[int, Choice] = {}
        self.weights: list[torch.Tensor] = []

    def shape(self, shape: Shape) -> Iterator[Measured]:
        """Give every kernel's figures at every number of rows."""
        self.weights.clear()
        self.weights += [
            torch.randn(shape.weight_rows, shape.k, device="cuda", dtype=torch.bfloat16).mul_(shape.k**-0.5)
            for _ in range(COPIES)
        ]
        for rows in ROWS:
            found = [self._measured(shape, rows, choice) for choice in candidates(shape, rows)]
            found.sort(key=lambda m: m.behind_us)
            kernels = [m.choice.kernel for m in found if m.choice.kernel != CUBLAS][:FINALISTS]
            finals = [Choice(kernel, ahead) for kernel in kernels for ahead in AHEAD_MIB]
            found += [self._measured(shape, rows, choice) for choice in finals]
            if shape.name == "gate_up":
                self.best_gate_up[rows] = min(found, key=lambda m: m.behind_us).choice
            yield from found

    def _measured(self, shape: Shape, rows: int, choice: Choice) -> Measured:
        x = torch.randn(rows, shape.k, device="cuda", dtype=torch.bfloat16)
        norm = torch.ones(shape.k, device="cuda", dtype=torch.bfloat16)
        multiply = self._multiply(shape, rows, choice)
        weights = self.weights
        alone_us = launch_us(lambda i: multiply(x, weights[i % COPIES]), LAUNCHES)
        behind_us = launch_us(
            lambda i: multiply(self.elementwise.rms_norm(x, norm, 1e-5), weights[i % COPIES]), LAUNCHES
        )
        of_reading = shape.ceiling_us / alone_us
        gb_s = of_reading * READ_BYTES_S / 1e9
        return Measured(shape.name, rows, choice, alone_us, behind_us, gb_s, of_reading)

    def _multiply(
        self, shape: Shape, rows: int, choice: Choice
    ) -> Callable[[torch.Tensor, torch.Tensor], object]:
        def by_us(x: torch.Tensor, weight: torch.Tensor, choice: Choice, outputs: int) -> torch.Tensor:
            out = torch.empty(rows, outputs, dtype=shape.out_dtype, device="cuda")
            self.linear.run(choice, x, weight, out)
            return out

        def by_cublas(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            if shape.out_dtype != x.dtype:
                return torch.mm(x, weight.t(), out_dtype=shape.out_dtype)
            return functional.linear(x, weight)

        if choice.kernel != CUBLAS:
            return lambda x, weight: by_us(x, weight, choice, shape.outputs)
        if not shape.is_gated:
            return by_cublas
        # What the fused kernel has to beat: the best product, then the gate.
        plain = self.best_gate_up[rows]
        if plain.kernel == CUBLAS:
            return lambda x, weight: self.elementwise.swiglu(by_cublas(x, weight))
        return lambda x, weight: self.elementwise.swiglu(by_us(x, weight, plain, shape.weight_rows))


def candidates(shape: Shape, rows: int) -> list[Choice]:
    """Return what can serve a shape at so many rows, nothing read ahead."""
    kernels: tuple[str, ...] = ()
    if rows <= GEMV_ROWS:
        kernels = (GATED if shape.is_gated else PLAIN)[column_tiles(rows)]
    return [Choice(CUBLAS), *map(Choice, kernels)]


def main() -> None:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as kernel_cache:
        _report(Bench(Path(kernel_cache)), asked.json)


def _report(bench: Bench, path: Path | None) -> None:
    found, table = list[Measured](), list[str]()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"ceiling: reading alone, {READ_BYTES_S / 1e9:,.0f} GB/s")
    print("* the choice. gate_up+swiglu: cublas stands for the best product, then the gate")
    for shape in SHAPES:
        known = "" if shape.known_us is None else f", known at 1 row {shape.known_us} us"
        print(f"\n{shape.name} {shape.weight_rows} x {shape.k}: ceiling {shape.ceiling_us:.1f} us{known}")
        print("rows  kernel                 ahead MiB  alone us    GB/s  of reading  norm + it us")
        measured = list(bench.shape(shape))
        found += measured
        for rows in ROWS:
            at = [m for m in measured if m.rows == rows]
            best = min(at, key=lambda m: m.behind_us)
            for m in at:
                mark = "*" if m is best else " "
                print(
                    f"{rows:4} {mark}{m.choice.kernel:22} {m.choice.ahead_mib:9} {m.alone_us:9.1f}"
                    f" {m.gb_s:7,.0f} {m.of_reading:11.2f} {m.behind_us:13.1f}"
                )
            if rows <= GEMV_ROWS:
                key = (shape.is_gated, rows, shape.outputs, shape.k)
                ahead = f", {best.choice.ahead_mib}" if best.choice.ahead_mib else ""
                table.append(f'    {key}: Choice("{best.choice.kernel}"{ahead}),')
        if path is not None:
            path.write_text(json.dumps([asdict(m) for m in found], indent=1) + "\n")
    print("\nMEASURED: dict[tuple[bool, int, int, int], Choice] = {")
    print("\n".join(table))
    print("}")


if __name__ == "__main__":
    main()
