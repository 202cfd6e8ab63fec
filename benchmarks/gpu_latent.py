"""How near to the bandwidth limit does latent attention decode, and how fast does it prefill?

Run: ``python -m benchmarks.gpu_latent [--heads 8 16 64] [--kv float8] [--operators DIR] [--json FILE]``.
Lines of 512 + 64, as DeepSeek-V3 and Kimi K2.5 have them; heads are a rank's. Decode: one query token a row
over scattered blocks; launches of a captured graph, each on a cache of its own until these are well beyond
the L2 cache. ``kernel`` is attention over the lines alone, in bytes of KV; ``attend`` also takes queries to
the latents and what comes out to values. Prefill: a prompt, and a chunk after cached tokens; operations are
those of the expanded form, expansion of the lines not counted.
"""

import argparse
import math
from itertools import accumulate
from pathlib import Path

import torch

from benchmarks.figures import Demand, Figure, as_data, table
from benchmarks.gpu_attention import COLD_BYTES, MATMUL_CEILING_TFLOPS, READ_CEILING_GBS, timed_us
from benchmarks.graph_time import launch_us
from kv.tensors import LayerCache
from worker.backends.base import LatentHeads
from worker.backends.cuda.compiler import KernelCache
from worker.backends.cuda.device import architecture, operators_directory
from worker.backends.cuda.latent import CudaLatents
from worker.backends.cuda.latent_own import LatentRows, LatentShape
from worker.backends.cuda.launch import Kernels

LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128
BLOCK_TOKENS = 64
BATCHES = (1, 8, 64, 256)
CONTEXTS = (1024, 8192)
MOST_LAYERS = 32
STEP_TOKENS = 8448
PROMPTS = {"8k": ([8192], [0]), "4 x 2k": ([2048] * 4, [0] * 4), "1k after 31k": ([1024], [31 * 1024])}


class Bench:
    """One number of heads. Caches of layers are cut from a pool of pages."""

    def __init__(
        self, kernels: Kernels, operators: Path | None, pages: torch.Tensor, heads: int, *, is_float8: bool
    ) -> None:
        self.device = pages.device
        self.pages = pages
        blocks = max(CONTEXTS[-1], *(sum(map(sum, given)) for given in PROMPTS.values())) // BLOCK_TOKENS
        self.shape = LatentShape(
            heads,
            LATENT,
            ROPE,
            NOPE,
            VALUE,
            1 / math.sqrt(NOPE + ROPE),
            torch.bfloat16,
            BLOCK_TOKENS,
            max(BATCHES),
            blocks,
            STEP_TOKENS,
            is_float8,
        )
        self.attention = CudaLatents(kernels, operators, self.shape, self.device)
        up = torch.randn(heads * (NOPE + VALUE), LATENT, device=self.device) / LATENT**0.5
        self.heads = LatentHeads(up.bfloat16(), NOPE, VALUE, self.shape.scale)

    def tables(self, lengths: list[int]) -> tuple[torch.Tensor, int]:
        """Return scattered block tables of rows, and the pages they take of a layer."""
        counts = [-(-length // BLOCK_TOKENS) for length in lengths]
        order = torch.randperm(sum(counts)).to(torch.int32)
        tables = torch.zeros((self.shape.max_rows + 1, self.shape.max_blocks), dtype=torch.int32)
        for row, mine in enumerate(torch.split(order, counts)):
            tables[row, : len(mine)] = mine
        return tables.to(self.device), sum(counts)

    def caches(self, pages: int) -> list[LayerCache]:
        """Return as many layers as make reads cold, of which each has so many pages."""
        size = pages * self.pages[0].nbytes
        count = max(1, min(math.ceil(COLD_BYTES / size), MOST_LAYERS, len(self.pages) // pages))
        found = []
        for i in range(count):
            lines = self.pages[i * pages : (i + 1) * pages]
            if not self.shape.is_float8:
                lines = lines.view(-1, LATENT + ROPE)
            found.append(LayerCache(0, lines, 1, LATENT + ROPE, 0))
        return found

    def queries(self, tokens: int) -> torch.Tensor:
        """Return random queries."""
        size = (tokens, self.shape.heads, NOPE + ROPE)
        return torch.randn(size, device=self.device).bfloat16()

    def decode(self, batch: int, context: int) -> list[Figure]:
        """Return the figures of a decode step's attention."""
        tables, pages = self.tables([context] * batch)
        caches = self.caches(pages)
        slots = torch.arange(batch, dtype=torch.int32, device=self.device)
        lengths = torch.full_like(slots, context)
        queries, heads = self.queries(batch), self.shape.heads
        out = torch.empty(batch, heads * VALUE, dtype=torch.bfloat16, device=self.device)
        absorbed = torch.randn(batch, heads, LATENT, device=self.device).bfloat16()
        found = torch.empty_like(absorbed)
        rows = LatentRows(batch, slots, lengths, None, tables)
        plan = self.attention.plan_decode(batch, slots, lengths, tables)
        lines = torch.empty(batch, LATENT + ROPE, dtype=torch.bfloat16, device=self.device)

        def kernel(i: int) -> None:
            cache = caches[i % len(caches)]
            self.attention.attend_lines(rows, absorbed, queries, cache, found)

        def attend(i: int) -> None:
            self.attention.run(queries, lines, self.heads, caches[i % len(caches)], plan, out)

        launches = max(8, len(caches))
        where = f"{heads} heads, batch {batch}, context {context}"
        kernel_us, attend_us = launch_us(kernel, launches), launch_us(attend, launches)
        kv_bytes = batch * context * self.pages[0].nbytes / BLOCK_TOKENS
        return [
            Figure(
                name=f"decode kernel, {where}",
                value=kv_bytes / kernel_us / 1e3,
                unit="GB/s",
                higher_is_better=True,
                demand=Demand(ceiling=READ_CEILING_GBS),
            ),
            Figure(name=f"decode kernel, {where}", value=kernel_us, unit="µs"),
            Figure(name=f"decode attend, {where}", value=attend_us, unit="µs"),
        ]

    def prefill(self, name: str) -> list[Figure]:
        """Return the figure of a step of many tokens; nothing where the operator was not built."""
        if not self.attention.is_expanding:
            return []
        counts, cached = PROMPTS[name]
        lengths = [count + before for count, before in zip(counts, cached, strict=True)]
        tables, pages = self.tables(lengths)
        cache, starts = self.caches(pages)[0], [0, *accumulate(counts)]
        queries, heads = self.queries(starts[-1]), self.shape.heads
        lines = torch.randn(starts[-1], LATENT + ROPE, device=self.device).bfloat16()
        out = torch.empty(starts[-1], heads * VALUE, dtype=torch.bfloat16, device=self.device)
        slots = torch.arange(len(counts), dtype=torch.int32, device=self.device)
        on_device = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        starts_device = torch.tensor(starts, dtype=torch.int32, device=self.device)
        plan = self.attention.plan_mixed(starts, lengths, slots, starts_device, on_device, tables)
        times = timed_us(lambda: self.attention.run(queries, lines, self.heads, cache, plan, out))
        us = sorted(times)[len(times) // 2]
        pairs = sum(n * (n + 1) / 2 + n * before for n, before in zip(counts, cached, strict=True))
        return [
            Figure(
                name=f"prefill {name}, {heads} heads",
                value=2 * heads * (NOPE + ROPE + VALUE) * pairs / us / 1e6,
                unit="TFLOP/s",
                higher_is_better=True,
                samples=times,
                demand=Demand(ceiling=MATMUL_CEILING_TFLOPS),
            )
        ]


def random_pages(count: int, *, is_float8: bool, device: torch.device) -> torch.Tensor:
    """Return pages of lines, [pages, …]."""
    if is_float8:
        # Codes of 1 to 1.9 in magnitude, and scales of 2^-71: any numbers do.
        size = (count, BLOCK_TOKENS * (LATENT + ROPE + 1))
        return torch.randint(56, 64, size, dtype=torch.uint8, device=device)
    size = (count, BLOCK_TOKENS * (LATENT + ROPE))
    return torch.empty(size, dtype=torch.bfloat16, device=device).normal_()


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--kv", choices=("bfloat16", "float8"), default="bfloat16")
    cache = Path.home() / ".cache" / "tandem" / "kernels"
    parser.add_argument("--kernels", type=Path, default=cache, help="the cache of compiled kernels")
    parser.add_argument("--operators", type=Path, help="FlashInfer's operators, where not in the cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    kernels = Kernels(KernelCache(arguments.kernels, architecture(0)))
    found = arguments.operators or operators_directory(arguments.kernels, architecture(0))
    is_float8 = arguments.kv == "float8"
    count = max(BATCHES) * max(CONTEXTS) // BLOCK_TOKENS
    pages = random_pages(count, is_float8=is_float8, device=device)
    figures: list[Figure] = []
    for heads in arguments.heads:
        bench = Bench(kernels, found if found.is_dir() else None, pages, heads, is_float8=is_float8)
        for batch in BATCHES:
            for context in CONTEXTS:
                figures += bench.decode(batch, context)
        for name in PROMPTS:
            figures += bench.prefill(name)
    print(table(figures))
    if arguments.json is not None:
        facts = {name: str(value) for name, value in vars(arguments).items() if name != "json"}
        facts |= {"device": torch.cuda.get_device_name(0), "torch": str(torch.__version__)}
        arguments.json.write_bytes(as_data(figures, facts))


if __name__ == "__main__":
    main()
