"""KV in another dtype than is computed in: sizes, codes, scales, and attention over them."""

import random
from pathlib import Path

import msgspec
import pytest
import torch

from kv.tensors import HostRegion, KVLayout, KVTensors, LayerCache
from models.memory import CPU_OVERHEADS, CUDA_OVERHEADS, MemoryPlan, StepLimits, plan_memory
from models.registry import load_spec
from models.spec import KVGroup
from orchestrator.config import ServeConfig
from orchestrator.instance import Blueprint
from protocol.errors import MemoryBudgetError, UnsupportedModelError
from protocol.topology import Topology
from tests.tiny_llama import write_tiny_llama
from tests.unit.test_worker_attention import HEADS, naive, random_step
from worker.backends.cpu import CpuBackend
from worker.backends.cpu_float8 import round_in_place, scale_bytes, scales_of
from worker.context import BlockTable, RowSpan

BLOCKS = 200


def cache_of(kv_heads: int, dim: int, block_tokens: int, kv_dtype: torch.dtype) -> LayerCache:
    """Return a cache with a pattern in all its bytes."""
    width = 2 * kv_heads * dim
    if kv_dtype == torch.uint8:
        page = torch.arange(block_tokens * kv_heads * (2 * dim + 2), dtype=torch.int64) % 100
        lines = page.to(torch.uint8).repeat(BLOCKS, 1)
    else:
        lines = torch.full((BLOCKS * block_tokens, width), 7.0, dtype=kv_dtype)
    return LayerCache(0, lines, kv_heads, dim, dim)


def as_float(cache: LayerCache) -> LayerCache:
    """Return what a cache stands for, element by element."""
    if not cache.is_float8:
        return LayerCache(0, cache.lines.double(), cache.heads, cache.key_dim, cache.value_dim)
    codes, scales = cache.codes(cache.lines), cache.scales(cache.lines)
    found = codes.double().view(*codes.shape[:2], 2, cache.heads, cache.key_dim)
    factors = torch.exp2(scales.double() - 127).permute(0, 3, 2, 1)
    lines = (found * factors.unsqueeze(-1)).flatten(2).flatten(0, 1)
    return LayerCache(0, lines, cache.heads, cache.key_dim, cache.value_dim)


def store(cache: LayerCache, qkv: torch.Tensor, spans: list[RowSpan], block_tokens: int) -> torch.Tensor:
    """Store the step's keys and values unrotated and return its attention."""
    still = torch.zeros(qkv.shape[0], 3, cache.key_dim // 2, dtype=qkv.dtype)
    still[:, 0] = 1
    width = 2 * cache.heads * cache.key_dim
    backend = CpuBackend(block_tokens * width * 6 * 3, frozenset({0}))
    plan = backend.plan_attention(spans, 0, block_tokens, width)
    with torch.inference_mode():
        return backend.attend(backend.rope_and_store(qkv, still, cache, plan), cache, plan)


@pytest.mark.parametrize("kv_dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_over_what_the_cache_holds(kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for seed in range(12):
        draw = random.Random(seed)
        kv_heads, dim = draw.choice([1, 2, 3, 6]), draw.choice([2, 6, 16, 20])
        block_tokens = draw.choice([1, 3, 4, 16])
        cache = cache_of(kv_heads, dim, block_tokens, kv_dtype)
        spans = random_step(draw, block_tokens, BLOCKS, draw.randrange(1, 7))
        tokens = spans[-1].offset + spans[-1].count
        generator = torch.Generator().manual_seed(seed)
        # Old tokens first, so that what is read makes sense.
        old = torch.randn(BLOCKS * block_tokens, (HEADS + 2 * kv_heads) * dim, generator=generator)
        everywhere = [RowSpan(0, 0, BLOCKS * block_tokens, (BlockTable(range(BLOCKS)),))]
        store(cache, old.to(dtype), everywhere, block_tokens)
        qkv = torch.randn(tokens, (HEADS + 2 * kv_heads) * dim, generator=generator).to(dtype)
        given = qkv.double()
        found = store(cache, qkv, spans, block_tokens)
        held = as_float(cache)
        expected = naive(given, held, spans, block_tokens)
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)
        for span in spans:
            at = [
                span.tables[0].ids[t // block_tokens] * block_tokens + t % block_tokens
                for t in range(span.start, span.end)
            ]
            new = given[span.offset : span.offset + span.count, HEADS * dim :]
            # Four bits of e4m3 or eight of bf16; below 2^-6 of the scale e4m3 has steps of 2^-9.
            torch.testing.assert_close(held.lines[at], new, rtol=2**-4, atol=2e-2)


def test_what_a_token_stores_is_its_own_whatever_stands_beside_it() -> None:
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(40, (HEADS + 4) * 16, generator=generator) * 3
    whole = cache_of(2, 16, 4, torch.uint8)
    run = [RowSpan(0, 0, 40, (BlockTable(range(100, 110)),))]
    store(whole, qkv.clone(), run, 4)
    pieces = cache_of(2, 16, 4, torch.uint8)
    scattered = BlockTable([3, 90, 17, 4, 5, 60, 2, 1, 0, 33])
    start = 0
    for count in (1, 2, 7, 1, 13, 16):
        part = qkv[start : start + count].clone()
        # Beside another row's tokens, a million times larger.
        other = torch.randn(5, qkv.shape[1], generator=generator) * 1e6
        spans = [RowSpan(0, 0, 5, (BlockTable([150, 151]),)), RowSpan(5, start, count, (scattered,))]
        store(pieces, torch.cat((other, part)), spans, 4)
        start += count
    assert torch.equal(whole.lines[100:110], pieces.lines[scattered.ids])
    untouched = cache_of(2, 16, 4, torch.uint8)
    assert torch.equal(whole.lines[:100], untouched.lines[:100])
    assert torch.equal(whole.lines[110:], untouched.lines[110:])


def test_the_scale_is_the_least_power_of_two_that_holds_the_largest() -> None:
    largest = torch.tensor([0.0, 448.0, 449.0, 1.75, 1.7500002, 1e-30, 1e30, 3e38, 2.0**-133])
    scales = scales_of(scale_bytes(largest)).double()
    assert (largest.double() <= 448 * scales).all()
    assert ((largest.double() > 224 * scales) | (scales == 2.0**-126))[1:].all()
    assert torch.equal(scales[1:5], torch.tensor([1.0, 2.0, 2.0**-8, 2.0**-7], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_to_the_nearest_code_and_bf16_holds_it(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(50, 3, 32, generator=generator) * torch.logspace(-6, 6, 50)[:, None, None]).to(dtype)
    given = x.double()
    codes, scales = round_in_place(x)
    factors = scales_of(scales).double().unsqueeze(-1)
    assert torch.equal(x.double(), codes.double() * factors)
    assert torch.equal(x.bfloat16().double(), x.double())
    spacing = torch.exp2(torch.floor(torch.log2((given / factors).abs()).clamp_min(-6)) - 3) * factors
    assert ((x.double() - given).abs() <= spacing / 2).all()
    again = x.clone()
    round_in_place(again)
    assert torch.equal(again, x)


def test_broken_numbers_stay_broken_and_stay_their_own() -> None:
    x = torch.ones(3, 2, 8)
    x[1, 0, 3] = torch.nan
    round_in_place(x)
    assert x[1, 0].isnan().any()
    assert torch.equal(x[1, 1], torch.ones(8))
    assert torch.equal(x[::2], torch.ones(2, 2, 8))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (6, 4), (576, 0)])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_pages_are_as_large_as_is_planned(tmp_path: Path, key_dim: int, value_dim: int, tp: int) -> None:
    write_tiny_llama(tmp_path)
    spec = load_spec(tmp_path, "float32", "float8")
    group = KVGroup("one", (0,), 2, key_dim, value_dim, "float8")
    heads = group.local_heads(Topology(tp))
    scales = 2 if value_dim else 1
    assert group.bytes_per_token(Topology(tp), range(1)) == heads * (key_dim + value_dim + scales)
    spec = msgspec.structs.replace(spec, kv_groups=(group,))
    layout = KVLayout.of(spec, range(1), Topology(tp), 5, 3, 1 << 20)
    cache = KVTensors(spec, Topology(tp), layout, HostRegion.anonymous("test-kv", layout.size_bytes))[0]
    codes, found = cache.codes(cache.lines), cache.scales(cache.lines)
    assert codes.shape == (5, 3, heads * (key_dim + value_dim))
    assert found.shape == (5, heads, scales, 3)
    found.fill_(1)
    codes.view(torch.uint8).fill_(2)
    assert cache.lines.sum() == found.numel() + 2 * codes.numel() == cache.lines.numel() + codes.numel()


def planned(directory: Path, kv_dtype: str) -> MemoryPlan:
    spec = load_spec(directory, "bfloat16", kv_dtype)
    return plan_memory(spec, Topology(), [1 << 30], StepLimits(8, 32, 8, 16), CPU_OVERHEADS, None)


def test_the_plan_holds_twice_the_tokens_less_the_scales(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    spec = load_spec(tmp_path)
    (group,) = spec.kv_groups
    dims = group.key_dim + group.value_dim
    wide, small = planned(tmp_path, "auto"), planned(tmp_path, "float8")
    assert small.kv_tokens / wide.kv_tokens == pytest.approx(2 * dims / (dims + 2), rel=1e-3)
    assert planned(tmp_path, "bfloat16") == wide
    assert small.tightest.lines[-1].because.endswith("in float8")


def test_a_refusal_for_want_of_memory_names_float8_where_it_would_help(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    for kv_dtype, is_named in (("auto", True), ("float8", False)):
        spec = load_spec(tmp_path, "bfloat16", kv_dtype)
        with pytest.raises(MemoryBudgetError, match="a smaller --context") as refusal:
            plan_memory(spec, Topology(), [1 << 20], StepLimits(8, 32, 8, 16), CPU_OVERHEADS, 512)
        assert ("--kv-dtype float8" in refusal.value.message) == is_named


def test_a_gpu_is_charged_for_contexts_in_bf16(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    limits, found = StepLimits(8, 600, 8, 16), {}
    for kv_dtype in ("auto", "float8"):
        spec = load_spec(tmp_path, "bfloat16", kv_dtype)
        made = plan_memory(spec, Topology(tp=2), [2 << 30] * 2, limits, CUDA_OVERHEADS, None)
        found[kv_dtype] = {line.name: line.predicted_bytes for line in made.tightest.lines}["workspace"]
    # A context, a step, a page for each row; one KV head of 16 a rank.
    assert found["float8"] - found["auto"] == (512 + 600 + 8 * 16) * 2 * 16 * 2


def test_what_is_not_known_or_not_served_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_llama(tmp_path)
    with pytest.raises(UnsupportedModelError, match="auto, bfloat16, float8"):
        load_spec(tmp_path, "float32", "int4")
    config = ServeConfig(
        name="x",
        model=tmp_path,
        runtime_root=tmp_path,
        environment={},
        devices=("cuda:0",),
        dtype="float32",
        kv_dtype="bfloat16",
    )
    odd = msgspec.structs.replace(config, kv_dtype="float8", block_tokens=12)
    for bad, what in (
        (config, "on the CPU alone: on a GPU leave --kv-dtype out"),
        (odd, "a multiple of 8 tokens, not of 12"),
    ):
        with pytest.raises(UnsupportedModelError, match=what) as refusal:
            Blueprint.of(bad)
        assert refusal.value.field == "kv_dtype"
    config = msgspec.structs.replace(config, kv_dtype="float8")
    on_cpu = Blueprint.of(msgspec.structs.replace(config, devices=("cpu",), memory_bytes=1 << 29))
    assert on_cpu.boots(1, [0], tmp_path, None)[0].kv_dtype == "float8"
