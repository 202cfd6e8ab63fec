"""Paged attention against a naive twin: one query at a time, softmax written out."""

import random

import pytest
import torch

from kv.tensors import LayerCache
from worker.backends.cpu import CpuBackend
from worker.context import BlockTable, RowSpan

HEADS = 6


def naive(
    qkv: torch.Tensor,
    cache: LayerCache,
    spans: list[RowSpan],
    block_tokens: int,
    chunk: int | None = None,
) -> torch.Tensor:
    """Return [tokens, heads * dim], each token over its row's lines up to itself, in float64.

    ``chunk``: only over those of the same chunk.
    """
    heads = (qkv.shape[1] - cache.lines.shape[1]) // cache.key_dim
    out = torch.empty(qkv.shape[0], heads, cache.value_dim, dtype=torch.float64)
    for span in spans:
        ids = span.tables[0].ids
        for i in range(span.count):
            seen = [
                ids[t // block_tokens] * block_tokens + t % block_tokens
                for t in range(span.start + i + 1)
                if chunk is None or t // chunk == (span.start + i) // chunk
            ]
            lines = cache.lines[seen].double()
            for head in range(heads):
                kv = head // (heads // cache.heads)
                query = qkv[span.offset + i, head * cache.key_dim :][: cache.key_dim].double()
                keys = lines[:, kv * cache.key_dim :][:, : cache.key_dim]
                first = cache.heads * cache.key_dim + kv * cache.value_dim
                values = lines[:, first : first + cache.value_dim]
                weights = torch.softmax(keys @ query / cache.key_dim**0.5, dim=0)
                out[span.offset + i, head] = weights @ values
    return out.flatten(1)


def random_step(draw: random.Random, block_tokens: int, num_blocks: int, rows: int) -> list[RowSpan]:
    free = list(range(num_blocks))
    if draw.random() < 0.7:
        draw.shuffle(free)
    spans, offset = [], 0
    for _ in range(rows):
        start = draw.choice([0, 0, 1, block_tokens - 1, block_tokens, draw.randrange(40)])
        count = draw.choice([1, 1, 2, block_tokens, draw.randrange(1, 20)])
        needed = -(-(start + count) // block_tokens) + draw.randrange(2)
        spans.append(RowSpan(offset, start, count, (BlockTable([free.pop(0) for _ in range(needed)]),)))
        offset += count
    return spans


def run_step(
    draw: random.Random,
    kv_heads: int,
    dim: int,
    block_tokens: int,
    gather_blocks: int,
    dtype: torch.dtype,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.set_num_threads(1)
    num_blocks = 200
    spans = random_step(draw, block_tokens, num_blocks, draw.randrange(1, 7))
    tokens = spans[-1].offset + spans[-1].count
    width = kv_heads * 2 * dim
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    lines = torch.randn(num_blocks * block_tokens, width, generator=generator).to(dtype)
    cache = LayerCache(0, lines, kv_heads, dim, dim)
    qkv = torch.randn(tokens, HEADS * dim + width, generator=generator).to(dtype)
    still = torch.zeros(tokens, 3, dim // 2, dtype=dtype)
    still[:, 0] = 1
    chunks = {} if chunk is None else {0: chunk}
    backend = CpuBackend(gather_bytes=gather_blocks * block_tokens * width * 4, chunks=chunks)
    plan = backend.plan_attention(spans, 0, block_tokens, width)
    before, given = lines.clone(), qkv.clone()
    with torch.inference_mode():
        backend.rope_and_store(qkv, still, cache, plan)
        found = backend.attend(qkv, cache, plan)
    assert torch.equal(qkv, given), "a rotation by nothing changed the input"
    written = {
        span.tables[0].ids[t // block_tokens] * block_tokens + t % block_tokens: span.offset
        + t
        - span.start
        for span in spans
        for t in range(span.start, span.end)
    }
    for line in range(lines.shape[0]):
        expected = qkv[written[line], -width:] if line in written else before[line]
        assert torch.equal(lines[line], expected)
    return found.double(), naive(qkv, cache, spans, block_tokens, chunk)


def check_many(count: int, seed: int) -> None:
    for i in range(count):
        draw = random.Random(seed + i)
        found, expected = run_step(
            draw,
            kv_heads=draw.choice([1, 2, 3, 6]),
            dim=draw.choice([2, 6, 16, 20]),
            block_tokens=draw.choice([1, 3, 4, 16]),
            gather_blocks=draw.choice([1, 2, 5, 100]),
            dtype=torch.float32,
            chunk=draw.choice([None, 1, 4, 7, 16, 30]),
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_attention_matches_its_naive_twin() -> None:
    check_many(25, 0)


@pytest.mark.long
def test_attention_matches_its_naive_twin_at_length() -> None:
    check_many(1500, 1000)


def test_attention_in_bfloat16_stays_near_its_twin() -> None:
    for seed in range(5):
        draw = random.Random(seed)
        found, expected = run_step(draw, 2, 16, 4, draw.choice([1, 100]), torch.bfloat16)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 64, 192, 193])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_of_any_number_of_rows_is_the_product(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 2 * 37, generator=generator).to(dtype)[:, ::2]
    weight = torch.randn(51, 37, generator=generator).to(dtype)
    bound = 1e-4 if dtype == torch.float32 else 0.2
    with torch.inference_mode():
        found = CpuBackend().linear(x, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=bound, atol=bound)


def test_norm_swiglu_and_embedding_match_their_formulas() -> None:
    backend = CpuBackend()
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 24, generator=generator), torch.randn(24, generator=generator)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(backend.rms_norm(x, weight, 1e-5).double(), expected, rtol=1e-5, atol=1e-6)
    gate, up = x[:, :12].double(), x[:, 12:].double()
    gated = backend.swiglu_linear(x, torch.eye(24))
    torch.testing.assert_close(gated.double(), gate * gate.sigmoid() * up, rtol=1e-5, atol=1e-6)
    table = torch.randn(4, 3, generator=generator)
    found = backend.embed(torch.tensor([9, 10, 12, 13, 0]), table, first=10, count=3)
    assert torch.equal(found, torch.stack((0 * table[0], table[0], table[2], 0 * table[0], 0 * table[0])))
