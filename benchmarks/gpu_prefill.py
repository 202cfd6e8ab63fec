"""What do the ways of a large step give a prefill, on a device that is kept as busy as by a whole model?

Layers of Llama-3-8B's shape with random weights run the steps that four prompts of 7,000 tokens make: their
attention over pages or over runs of the cache, their blocks' sums added by the products or by the norms.
All four ways take turns, so that a clock that falls with the power falls for all; then attention alone.

    python -m benchmarks.gpu_prefill [--kernels DIRECTORY] [--operators DIRECTORY] [--json FILE]
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path

import torch

from benchmarks.figures import Demand, Figure, as_data, table
from benchmarks.llama_8b_on_h200 import DEMANDS, MATMUL_FLOPS
from kv.tensors import LayerCache
from protocol.topology import Topology
from worker.backends.cuda.attention import CudaAttention, PagedPlan
from worker.backends.cuda.backend import CudaBackend, CudaStepPlan
from worker.backends.cuda.comm import CudaCommunicator
from worker.backends.cuda.compiler import KernelCache
from worker.backends.cuda.cublaslt import CublasLt
from worker.backends.cuda.device import architecture, operators_directory
from worker.backends.cuda.gemm_table import GemmTable, read, table_path
from worker.backends.cuda.launch import Kernels
from worker.backends.cuda.linear import Linear
from worker.layers.rope import Rope

HIDDEN, INNER, HEADS, KV_HEADS, DIM = 4096, 14336, 32, 8, 128
LAYERS, WEIGHTS = 32, 4
"""Layers that run, and those that have weights of their own: together beyond what a cache holds."""
PROMPTS, STEP_TOKENS, BLOCK_TOKENS = (7000,) * 4, 8448, 64
EPS, ROUNDS = 1e-5, 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + count) of a prompt, in one step."""

    row: int
    start: int
    count: int


def steps() -> Iterator[list[Chunk]]:
    """Give the steps of the prompts, each as full as may be, the first prompts first."""
    left = [Chunk(row, 0, tokens) for row, tokens in enumerate(PROMPTS)]
    while left:
        room, step = STEP_TOKENS, list[Chunk]()
        while left and room:
            chunk = left.pop(0)
            taken = min(chunk.count, room)
            room -= taken
            step.append(Chunk(chunk.row, chunk.start, taken))
            if taken < chunk.count:
                left.insert(0, Chunk(chunk.row, chunk.start + taken, chunk.count - taken))
        yield step


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer."""

    qkv: torch.Tensor
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor

    @classmethod
    def draw(cls, device: torch.device) -> "Layer":
        """Return random weights."""

        def matrix(outputs: int, k: int) -> torch.Tensor:
            return torch.randn(outputs, k, device=device, dtype=torch.bfloat16).mul_(k**-0.5)

        return cls(
            matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
            matrix(HIDDEN, HEADS * DIM),
            matrix(2 * INNER, HIDDEN),
            matrix(HIDDEN, INNER),
            torch.ones(HIDDEN, device=device, dtype=torch.bfloat16),
        )


class Bench:
    """Owner of the layers, of their caches and of what a rank computes with."""

    def __init__(self, kernels: Path, operators: Path | None) -> None:
        self.device = device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        name = architecture(0)
        compiled = Kernels(KernelCache(kernels, name))
        self._row_blocks = -(-max(PROMPTS) // BLOCK_TOKENS)
        self.attention = CudaAttention(
            compiled,
            operators or operators_directory(kernels, name),
            heads=HEADS,
            kv_heads=KV_HEADS,
            key_dim=DIM,
            value_dim=DIM,
            dtype=torch.bfloat16,
            block_tokens=BLOCK_TOKENS,
            max_rows=len(PROMPTS),
            max_blocks=self._row_blocks,
            step_tokens=STEP_TOKENS,
            device=device,
        )
        lt = CublasLt(device)
        measured = GemmTable(read(table_path(kernels, torch.cuda.get_device_name(0), lt.version)))
        self._comm = CudaCommunicator(0, Topology())
        linear = Linear(compiled, lt, measured)
        # Latents are asked for by no layer here.
        self._backend = CudaBackend(device, compiled, self.attention, linear)  # type: ignore[arg-type]
        self._layers = [Layer.draw(device) for _ in range(WEIGHTS)]
        blocks = self._row_blocks * len(PROMPTS)
        size = (blocks * BLOCK_TOKENS, 2 * KV_HEADS * DIM)
        self.caches = [
            LayerCache(0, torch.randn(size, device=device).bfloat16(), KV_HEADS, DIM, DIM)
            for _ in range(LAYERS)
        ]
        self._tables = torch.arange(blocks, dtype=torch.int32, device=device).view(len(PROMPTS), -1)
        with device:
            rope = Rope(5e5, DIM, None, max(PROMPTS), torch.bfloat16)
        # Made before: a copy of theirs would wait for the device between two steps.
        self._steps = [(step, *self._inputs(step, rope)) for step in steps()]
        self._hidden = torch.randn(STEP_TOKENS, HIDDEN, device=device).bfloat16()

    def plan(self, step: list[Chunk], *, by_runs: bool) -> PagedPlan:
        """Plan a step's attention."""
        q_starts = [0, *accumulate(chunk.count for chunk in step)]
        ends = [chunk.start + chunk.count for chunk in step]

        def on_device(numbers: list[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int32, pin_memory=True).to(
                self.device, non_blocking=True
            )

        rows = [chunk.row for chunk in step]
        first_blocks = [row * self._row_blocks for row in rows] if by_runs else []
        return self.attention.plan_mixed(
            q_starts,
            ends,
            on_device(rows),
            on_device(q_starts),
            on_device(ends),
            self._tables,
            first_blocks,
        )

    def _inputs(self, step: list[Chunk], rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a step rotates with, and its tokens' lines in a cache."""
        positions = torch.cat([torch.arange(c.start, c.start + c.count) for c in step])
        rows = torch.cat([torch.full((c.count,), c.row) for c in step])
        lines = rows * self._row_blocks * BLOCK_TOKENS + positions
        return rope(positions.to(self.device)), lines.to(self.device)

    def burst(self, *, by_runs: bool, adds: bool) -> None:
        """Queue all steps of all prompts."""
        for step, rotation, lines in self._steps:
            plan = CudaStepPlan(lines, self.plan(step, by_runs=by_runs))
            hidden = self._hidden[: len(lines)].clone()
            update: torch.Tensor | None = None
            for number, cache in enumerate(self.caches):
                layer = self._layers[number % WEIGHTS]
                update = self._run(layer, hidden, update, rotation, cache, plan, adds=adds)

    def _run(
        self,
        layer: Layer,
        hidden: torch.Tensor,
        update: torch.Tensor | None,
        rotation: torch.Tensor,
        cache: LayerCache,
        plan: CudaStepPlan,
        *,
        adds: bool,
    ) -> torch.Tensor | None:
        backend, comm = self._backend, self._comm

        def normed(update: torch.Tensor | None) -> torch.Tensor:
            if update is None:
                return backend.rms_norm(hidden, layer.norm, EPS)
            return backend.reduce_add_norm(hidden, update, layer.norm, EPS, comm)

        def end_of_block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
            return backend.linear_update(hidden, x, weight, comm) if adds else backend.linear(x, weight)

        qkv = backend.linear(normed(update), layer.qkv)
        queries = backend.rope_and_store(qkv, rotation, cache, plan)
        update = end_of_block(backend.attend(queries, cache, plan), layer.o)
        return end_of_block(backend.swiglu_linear(normed(update), layer.gate_up), layer.down)

    def attention_us(self, step: list[Chunk], *, by_runs: bool) -> float:
        """Return the microseconds of one layer's attention of a step, of all layers in the mean."""
        tokens = sum(chunk.count for chunk in step)
        queries = torch.randn(tokens, HEADS * DIM, device=self.device).bfloat16()
        plan, out = self.plan(step, by_runs=by_runs), torch.empty_like(queries)

        def run() -> None:
            for cache in self.caches:
                self.attention.run(queries, cache, plan, out)

        run()
        return statistics.median(_seconds(run) for _ in range(3)) / LAYERS * 1e6


def _seconds(work: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def measure(bench: Bench) -> list[Figure]:
    """Return the tokens a second of each way, then what attention alone reaches in each step."""
    ways = list(product((False, True), (False, True)))
    samples: dict[tuple[bool, bool], list[float]] = {way: [] for way in ways}
    for round_number in range(ROUNDS + 1):
        for by_runs, adds in ways:
            taken_s = _seconds(lambda by_runs=by_runs, adds=adds: bench.burst(by_runs=by_runs, adds=adds))  # type: ignore[misc]
            if round_number:
                samples[by_runs, adds].append(sum(PROMPTS) / taken_s)
    figures = [
        Figure(
            name=f"layers alone, {'runs' if by_runs else 'pages'}, {'product' if adds else 'norm'} adds",
            value=statistics.median(found),
            unit="tokens/s",
            higher_is_better=True,
            samples=found,
            demand=Demand(ceiling=DEMANDS["prefill, 4 x 7000"].ceiling),
        )
        for (by_runs, adds), found in samples.items()
    ]
    for step in steps():
        seen = sum(c.count * c.start + c.count * (c.count + 1) / 2 for c in step)
        for by_runs in (False, True):
            us = bench.attention_us(step, by_runs=by_runs)
            chunks = " + ".join(f"{c.count} after {c.start}" for c in step)
            figures.append(
                Figure(
                    name=f"attention, {'runs' if by_runs else 'pages'}, {chunks}",
                    value=4 * HEADS * DIM * seen / us / 1e6,
                    unit="TFLOP/s",
                    higher_is_better=True,
                    demand=Demand(ceiling=MATMUL_FLOPS / 1e12),
                )
            )
    return figures


@torch.inference_mode()
def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    kernels = Path.home() / ".cache" / "tandem" / "kernels"
    parser.add_argument("--kernels", type=Path, default=kernels, help="the cache of compiled kernels")
    parser.add_argument("--operators", type=Path, help="FlashInfer's operators, where not in the cache")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = measure(Bench(options.kernels, options.operators))
    print(table(figures))
    if options.json is not None:
        facts = {"device": torch.cuda.get_device_name(0), "torch": str(torch.__version__)}
        options.json.write_bytes(as_data(figures, facts))


if __name__ == "__main__":
    main()
