"""How near to the bandwidth limit does each attention path decode, and how fast does it prefill?

Run: ``python -m benchmarks.gpu_attention [--heads 32 --kv-heads 8 --dim 128] [--kv float8] [--json FILE]``.
Decode: one query token a row over scattered blocks; launches of a captured graph, each on a cache of its
own until these are well beyond the L2 cache; medians of repeats; KV bytes alone. The lines on the way name
the fastest path of each size: ``worker/backends/cuda/attention_paths.py`` is set from them.
"""

import argparse
import math
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch

from benchmarks.figures import Demand, Figure, as_data, table
from kv.tensors import LayerCache
from worker.backends.cuda.attention import CudaAttention
from worker.backends.cuda.attention_own import Shape
from worker.backends.cuda.attention_paths import DecodePath, DecodeRule, PrefillPath, RingPath
from worker.backends.cuda.compiler import KernelCache
from worker.backends.cuda.device import architecture, operators_directory
from worker.backends.cuda.launch import Kernels

READ_CEILING_GBS = 4660.0
MATMUL_CEILING_TFLOPS = 785.0
BATCHES = (1, 8, 64, 256)
CONTEXTS = (192, 512, 1024, 8192)
SPREAD = (64, 1088)
XQA: tuple[DecodePath, ...] = ("xqa", "xqa_wide")
FEW_ROWS = 8
FOR_FEW: tuple[RingPath, ...] = ("ring_2x3", "ring_4x2", "ring_8x2")
IN_CLUSTERS: tuple[RingPath, ...] = ("ring_8x2_by_2",)
FOR_MANY: tuple[RingPath, ...] = ("ring_2x3", "ring_4x2")
FLOAT8_FOR_FEW: tuple[RingPath, ...] = ("ring_2x6_e4m3", "ring_4x4_e4m3", "ring_8x4_e4m3")
FLOAT8_IN_CLUSTERS: tuple[RingPath, ...] = ("ring_8x4_by_2_e4m3",)
FLOAT8_FOR_MANY: tuple[RingPath, ...] = ("ring_2x6_e4m3", "ring_4x4_e4m3")
PREFILL: tuple[PrefillPath, ...] = ("fa3", "fa2", "tiled")
PROMPTS = (7000,) * 4
COLD_BYTES = 512 << 20
MOST_LAUNCHES = 256
REPEATS = 7


class Bench:
    """One shape in bf16. Owns a pool of KV pages that caches of layers are cut from."""

    def __init__(
        self,
        kernels: Path,
        operators: Path | None,
        heads: int,
        kv_heads: int,
        dim: int,
        block_tokens: int,
        *,
        is_float8: bool,
    ) -> None:
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        name = architecture(0)
        found = operators or operators_directory(kernels, name)
        self.kernels = Kernels(KernelCache(kernels, name))
        self.operators = found if found.is_dir() else None
        blocks = max(CONTEXTS) // block_tokens
        tokens = sum(PROMPTS)
        self.shape = Shape(
            heads,
            kv_heads,
            dim,
            dim,
            torch.bfloat16,
            block_tokens,
            max(BATCHES),
            blocks,
            tokens,
            is_float8,
        )
        self.token_bytes = 2 * kv_heads * (dim + 1 if is_float8 else 2 * dim)
        pages = max(BATCHES) * max(CONTEXTS) // block_tokens
        size = (pages, block_tokens * self.token_bytes)
        if is_float8:
            # Codes of 1 to 1.9 in magnitude, and scales of 2^-71: any numbers do.
            self.pages = torch.randint(56, 64, size, dtype=torch.uint8, device=self.device)
        else:
            elements = (pages, size[1] // 2)
            self.pages = torch.empty(elements, dtype=torch.bfloat16, device=self.device).normal_()

    def attention(self, decode: tuple[DecodeRule, ...], prefill: tuple[PrefillPath, ...]) -> CudaAttention:
        """Return attention that takes these paths where they are available."""
        shape = self.shape
        return CudaAttention(
            self.kernels,
            self.operators,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
            dtype=shape.dtype,
            block_tokens=shape.block_tokens,
            max_rows=shape.max_rows,
            max_blocks=shape.max_blocks,
            step_tokens=shape.step_tokens,
            device=self.device,
            is_float8=shape.is_float8,
            expanded_tokens=shape.step_tokens + shape.max_rows * shape.block_tokens,
            decode_paths=decode,
            prefill_paths=prefill,
        )

    def tables(self, lengths: list[int]) -> tuple[torch.Tensor, int]:
        """Return scattered block tables of rows, and the pages they take of a layer."""
        counts = [-(-length // self.shape.block_tokens) for length in lengths]
        order = torch.randperm(sum(counts), dtype=torch.int64).to(torch.int32)
        block_tables = torch.zeros((self.shape.max_rows + 1, self.shape.max_blocks), dtype=torch.int32)
        for row, mine in enumerate(torch.split(order, counts)):
            block_tables[row, : len(mine)] = mine
        return block_tables.to(self.device), sum(counts)

    def caches(self, pages: int) -> list[LayerCache]:
        """Return as many layers as make reads cold, of which each has so many pages."""
        shape = self.shape
        size = pages * shape.block_tokens * self.token_bytes
        wanted = min(math.ceil(COLD_BYTES / size), MOST_LAUNCHES)
        caches = []
        for i in range(max(1, min(wanted, len(self.pages) // pages))):
            lines = self.pages[i * pages : (i + 1) * pages]
            if not shape.is_float8:
                lines = lines.view(-1, self.token_bytes // 2)
            caches.append(LayerCache(0, lines, shape.kv_heads, shape.key_dim, shape.value_dim))
        return caches

    def decode_us(self, rule: DecodeRule, contexts: list[int]) -> list[float] | None:
        """Return microseconds a launch, of each repeat, or None where the path is not available."""
        shape, batch = self.shape, len(contexts)
        attention = self.attention((rule, DecodeRule("vector")), ("tiled",))
        if attention.decode_path(batch) != rule.path:
            return None
        block_tables, pages = self.tables(contexts)
        caches = self.caches(pages)
        launches = max(8, len(caches))
        rows = torch.arange(batch, dtype=torch.int32, device=self.device)
        lengths = torch.tensor(contexts, dtype=torch.int32, device=self.device)
        queries = torch.randn((batch, shape.heads * shape.key_dim), device=self.device).to(shape.dtype)
        out = torch.empty_like(queries)
        plan = attention.plan_decode(batch, rows, lengths, block_tables)

        def run() -> None:
            for i in range(launches):
                attention.run(queries, caches[i % len(caches)], plan, out)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return [us / launches for us in timed_us(graph.replay)]

    def prefill_us(self, path: PrefillPath) -> list[float] | None:
        """Return microseconds of the prompts, of each repeat, or None where the path is not available."""
        shape = self.shape
        attention = self.attention((DecodeRule("vector"),), (path,))
        if attention.prefill_path != path:
            return None
        starts = [0, *accumulate(PROMPTS)]
        block_tables, pages = self.tables(list(PROMPTS))
        cache = self.caches(pages)[0]
        size = (starts[-1], shape.heads * shape.key_dim)
        queries = torch.randn(size, device=self.device).to(shape.dtype)
        out = torch.empty_like(queries)
        rows = torch.arange(len(PROMPTS), dtype=torch.int32, device=self.device)
        lengths = torch.tensor(PROMPTS, dtype=torch.int32, device=self.device)
        starts_device = torch.tensor(starts, dtype=torch.int32, device=self.device)
        plan = attention.plan_mixed(starts, list(PROMPTS), rows, starts_device, lengths, block_tables)
        return timed_us(lambda: attention.run(queries, cache, plan, out))


def timed_us(call: Callable[[], object]) -> list[float]:
    """Return microseconds of a call on the device, of each repeat; two calls before are not counted."""
    times = []
    for repeat in range(REPEATS + 2):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        call()
        ended.record()
        ended.synchronize()
        if repeat >= 2:
            times.append(began.elapsed_time(ended) * 1e3)
    return times


def decode_rules(batch: int, *, is_float8: bool) -> list[DecodeRule]:
    """Return what is tried: where rows are many, cutting them is of little use."""
    few, many, clusters = FOR_FEW, FOR_MANY, IN_CLUSTERS
    rules = [*map(DecodeRule, XQA), DecodeRule("tensor", split_tokens=64 if batch <= FEW_ROWS else 256)]
    if is_float8:
        few, many, clusters = FLOAT8_FOR_FEW, FLOAT8_FOR_MANY, FLOAT8_IN_CLUSTERS
        rules = [DecodeRule("vector")]
    if batch <= FEW_ROWS:
        rules += [DecodeRule(path, split_tokens=tokens) for path in few for tokens in (64, 128, 256)]
        return rules + [DecodeRule(path) for path in clusters]
    return rules + [DecodeRule(path, split_tokens=tokens) for path in many for tokens in (256, 1024)]


def decode_contexts(batch: int) -> dict[str, list[int]]:
    """Return the tokens of each row by their name: rows that are alike, and many of all lengths."""
    contexts = {str(context): [context] * batch for context in CONTEXTS}
    if batch > FEW_ROWS:
        first, last = SPREAD
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(0)).tolist()
        contexts[f"{first} to {last}"] = [first + (last - first) * i // (batch - 1) for i in order]
    return contexts


def measure(bench: Bench) -> list[Figure]:
    """Return every path at every size, and for each size the fastest path."""
    figures = []
    shape = bench.shape
    for batch in BATCHES:
        for context, lengths in decode_contexts(batch).items():
            found: dict[str, float] = {}
            kv_bytes = sum(lengths) * bench.token_bytes
            for rule in decode_rules(batch, is_float8=shape.is_float8):
                times = bench.decode_us(rule, lengths)
                if times is None:
                    continue
                is_cut_alike = rule.path in (*XQA, *IN_CLUSTERS, *FLOAT8_IN_CLUSTERS)
                path = rule.path if is_cut_alike else f"{rule.path}@{rule.split_tokens}"
                us = found[path] = sorted(times)[len(times) // 2]
                where = f"decode {path}, batch {batch}, context {context}"
                figures += [
                    Figure(name=where, value=us, unit="µs", samples=times),
                    Figure(
                        name=where,
                        value=kv_bytes / us / 1e3,
                        unit="GB/s",
                        higher_is_better=True,
                        demand=Demand(ceiling=READ_CEILING_GBS),
                    ),
                ]
            print(f"batch {batch}, context {context}: {min(found, key=found.__getitem__)}", flush=True)
    operations = 2 * shape.heads * (shape.key_dim + shape.value_dim) * sum(n * (n + 1) / 2 for n in PROMPTS)
    for prefill in PREFILL:
        times = bench.prefill_us(prefill)
        if times is not None:
            us = sorted(times)[len(times) // 2]
            figures.append(
                Figure(
                    name=f"prefill {prefill}, {len(PROMPTS)} x {PROMPTS[0]}",
                    value=operations / us / 1e6,
                    unit="TFLOP/s",
                    higher_is_better=True,
                    samples=times,
                    demand=Demand(ceiling=MATMUL_CEILING_TFLOPS),
                )
            )
    return figures


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--kv", choices=("bfloat16", "float8"), default="bfloat16")
    kernels = Path.home() / ".cache" / "tandem" / "kernels"
    parser.add_argument("--kernels", type=Path, default=kernels, help="the cache of compiled kernels")
    parser.add_argument("--operators", type=Path, help="FlashInfer's operators, where not in the cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bench = Bench(
        arguments.kernels,
        arguments.operators,
        arguments.heads,
        arguments.kv_heads,
        arguments.dim,
        arguments.block_tokens,
        is_float8=arguments.kv == "float8",
    )
    figures = measure(bench)
    print(table(figures))
    if arguments.json is not None:
        facts = {name: str(value) for name, value in vars(arguments).items() if name != "json"}
        facts |= {"device": torch.cuda.get_device_name(0), "torch": str(torch.__version__)}
        arguments.json.write_bytes(as_data(figures, facts))


if __name__ == "__main__":
    main()
