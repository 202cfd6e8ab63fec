"""How near do experts come to what a GPU can read and multiply, layer by layer of models that have them?

Run on an idle GPU: ``python -m benchmarks.gpu_moe [--json PATH] [--variants]``. Each time is that of one of
32 launches in a replayed CUDA graph, every one with tokens that chose at random for themselves, so that no
cache holds their experts. The ceiling of a product is the larger of two times: the weights of the experts
hit at 4,050 GB/s, and the multiply-adds at 785 TFLOP/s. ``layer`` is all of it, router to sum, in chunks
as a step takes it. ``--variants`` times every kernel that could serve, and marks the one that does.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.graph_time import launch_us
from models.moe import CHUNK_TOKENS, Routing
from worker.backends.base import ExpertWeights, Int4Weight, Routed
from worker.backends.cuda.compiler import KernelCache
from worker.backends.cuda.elementwise import Elementwise
from worker.backends.cuda.grouped import Grouped, Slots, Weight, kind_of
from worker.backends.cuda.grouped_table import VARIANTS, Variant, choose
from worker.backends.cuda.launch import Kernels
from worker.backends.cuda.linear import Linear
from worker.backends.cuda.moe import CudaExperts

TOKENS = (1, 8, 32, 128, 512, 1024, 4096)
LAUNCHES = 32
BYTES_S = 4050e9
FLOPS = 785e12
INT4_BYTES = 0.5 + 2 / 32


@dataclass(frozen=True, slots=True)
class Shape:
    """One rank's experts of a layer."""

    name: str
    routing: Routing
    hidden: int
    width: int
    local: int
    is_int4: bool = False
    is_turned: bool = False
    """Weights lie [in, out]."""
    known_us: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    """Of gate_up and down at 1, 8, 32, 128, 512 and 4096 tokens, another library's on an H200."""


_KIMI = Routing(384, 8, scores="sigmoid", normalize=True, scale=2.827)
SHAPES = (
    Shape(
        "Kimi K2.5 TP8",
        _KIMI,
        7168,
        256,
        384,
        is_int4=True,
        known_us=((12.8, 36.9, 99.9, 185, 245, 486), (6.8, 24.1, 63.0, 115, 140, 490)),
    ),
    Shape(
        "Kimi K2.5 EP8",
        _KIMI,
        7168,
        2048,
        48,
        is_int4=True,
        known_us=((15.3, 38.4, 99.3, 186, 231, 459), (10.5, 25.0, 61.7, 106, 127, 268)),
    ),
    Shape("Scout TP2", Routing(16, 1, scores="sigmoid", weighs="input"), 5120, 4096, 16, is_turned=True),
    Shape("Qwen3-30B-A3B", Routing(128, 8, normalize=True), 2048, 768, 128),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table."""

    shape: str
    what: str
    tokens: int
    kernel: str
    us: float
    ceiling_us: float
    gb_s: float
    tflop_s: float
    known_us: float | None

    @property
    def reached(self) -> float:
        """What part of the ceiling."""
        return self.ceiling_us / self.us


class Bench:
    """Owner of the kernels, and of one shape's weights at a time."""

    def __init__(self, kernel_cache: Path) -> None:
        torch.zeros(1, device="cuda")
        major, minor = torch.cuda.get_device_capability()
        kernels = Kernels(KernelCache(kernel_cache, f"sm_{major}{minor}{'a' if major >= 9 else ''}"))
        self._parts = kernels, Linear(kernels), Elementwise(kernels)
        self._grouped = Grouped(kernels)

    def shape(self, shape: Shape, *, all_variants: bool) -> Iterator[Measured]:
        """Give the figures of a shape at every number of tokens."""
        # Logits of a size that no sigmoid makes 1: else all tokens choose the same few experts.
        router = torch.randn(shape.routing.experts, shape.hidden, device="cuda") / shape.hidden**0.5
        router = router.bfloat16()
        products = _weights(shape)
        weights = ExpertWeights(router, None, *products)
        experts = CudaExperts(*self._parts, weights, shape.routing)
        for tokens in TOKENS:
            sets = [_choices(tokens, shape.routing) for _ in range(LAUNCHES)]
            hit = sum(_hit(one, shape.local) for one in sets) / LAUNCHES
            chosen = sum(int((one.experts < shape.local).sum()) for one in sets) / LAUNCHES
            if not hit:
                continue
            for place, what in enumerate(("gate_up", "down")):
                yield from self._product(
                    shape, products, experts, sets, hit, chosen, place, what, all_variants
                )
            if not all_variants:
                yield self._layer(shape, experts, tokens, hit, chosen)

    def _product(
        self,
        shape: Shape,
        products: tuple[Weight, Weight],
        experts: CudaExperts,
        sets: list[Routed],
        hit: float,
        chosen: float,
        place: int,
        what: str,
        all_variants: bool,
    ) -> Iterator[Measured]:
        tokens = sets[0].experts.shape[0]
        is_down = what == "down"
        weight = products[place]
        k = shape.width if is_down else shape.hidden
        rows = sets[0].experts.numel() if is_down else tokens
        x = torch.randn(rows, k, device="cuda").bfloat16()
        known_at = [t for t in TOKENS if t != 1024].index(tokens) if tokens != 1024 else None
        known = shape.known_us[place]
        known_us = known[known_at] if known and known_at is not None else None
        few = sets[0].experts.numel() <= 32
        variants: list[Variant | None] = [None]
        if all_variants:
            variants += VARIANTS[kind_of(weight)]
        for variant in variants:
            columns = None if variant is None else variant.columns
            slots = [_sorted(experts, one, columns) for one in sets]
            served = variant or choose(k, slots[0].columns, few=few, kind=kind_of(weight))

            def multiply(i: int, variant: Variant | None = variant, slots: list[Slots] = slots) -> object:
                return self._grouped(
                    x, weight, slots[i], gathers=not is_down, gated=not is_down, few=few, variant=variant
                )

            us = launch_us(multiply, LAUNCHES)
            name = ("*" if variant is None else " ") + served.name(gated=not is_down)
            yield _measured(
                shape, what, tokens, name, us, hit, chosen, (1, 0) if not is_down else (0, 1), known_us
            )

    def _layer(
        self, shape: Shape, experts: CudaExperts, tokens: int, hit: float, chosen: float
    ) -> Measured:
        inputs = [torch.randn(tokens, shape.hidden, device="cuda").bfloat16() for _ in range(LAUNCHES)]

        def run(i: int) -> None:
            for x in torch.split(inputs[i], CHUNK_TOKENS):
                experts.run(x, experts.route(x))

        return _measured(shape, "layer", tokens, "", launch_us(run, LAUNCHES), hit, chosen, (1, 1), None)


def _measured(
    shape: Shape,
    what: str,
    tokens: int,
    kernel: str,
    us: float,
    hit: float,
    chosen: float,
    parts: tuple[int, int],
    known_us: float | None,
) -> Measured:
    """``hit``: experts; ``chosen``: choices of them; ``parts``: how often gate|up and down count."""
    elements = (2 * parts[0] + parts[1]) * shape.width * shape.hidden
    num_bytes = hit * elements * (INT4_BYTES if shape.is_int4 else 2)
    flops = 2 * chosen * elements
    ceiling_us = max(num_bytes / BYTES_S, flops / FLOPS) * 1e6
    return Measured(
        shape.name, what, tokens, kernel, us, ceiling_us, num_bytes / us / 1e3, flops / us / 1e6, known_us
    )


def _weights(shape: Shape) -> tuple[Weight, Weight]:
    """Return gate|up and down."""

    def made(rows: int, k: int) -> Weight:
        if not shape.is_int4:
            lies = (k, rows) if shape.is_turned else (rows, k)
            weight = torch.empty(shape.local, *lies, dtype=torch.bfloat16, device="cuda").normal_(
                0, k**-0.5
            )
            return weight.transpose(1, 2) if shape.is_turned else weight
        words = torch.empty(shape.local, rows, k // 8, dtype=torch.int32, device="cuda")
        words.random_(-(1 << 31), (1 << 31) - 1)
        scales = torch.empty(shape.local, rows, k // 32, device="cuda").uniform_(0.5, 1.5) / (4 * k**0.5)
        return Int4Weight(words, scales.bfloat16())

    return made(2 * shape.width, shape.hidden), made(shape.hidden, shape.width)


def _choices(tokens: int, routing: Routing) -> Routed:
    experts = torch.rand(tokens, routing.experts, device="cuda").topk(routing.top_k, -1).indices
    return Routed(experts.contiguous(), torch.rand(tokens, routing.top_k, device="cuda"))


def _hit(routed: Routed, local: int) -> int:
    return int((routed.experts.flatten().bincount(minlength=local)[:local] > 0).sum())


def _sorted(experts: CudaExperts, routed: Routed, columns: int | None) -> Slots:
    return experts.sort(routed, is_plain=False, rows_are_choices=False, columns=columns)


def main() -> None:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--variants", action="store_true")
    asked = parser.parse_args()
    found: list[Measured] = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"ceiling: the experts hit at {BYTES_S / 1e9:,.0f} GB/s, products at {FLOPS / 1e12:.0f} TFLOP/s")
    with tempfile.TemporaryDirectory() as kernel_cache, torch.inference_mode():
        bench = Bench(Path(kernel_cache))
        for shape in SHAPES:
            print(f"\n{shape.name}: {shape.local} experts, {shape.hidden} x {shape.width}")
            print(
                "tokens  what     kernel                       us  ceiling  reached   GB/s TFLOP/s  known"
            )
            for m in bench.shape(shape, all_variants=asked.variants):
                found.append(m)
                known = "" if m.known_us is None else f"{m.known_us:6.1f}"
                print(
                    f"{m.tokens:6}  {m.what:8} {m.kernel:22} {m.us:8.1f} {m.ceiling_us:8.1f}"
                    f" {m.reached:8.2f} {m.gb_s:6,.0f} {m.tflop_s:7.0f} {known}"
                )
            torch.cuda.empty_cache()
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(m) for m in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
