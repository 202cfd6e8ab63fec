"""Latent attention against a naive twin: keys and values of each head written out, one query at a time."""

import random

import pytest
import torch

from kv.tensors import LayerCache
from tests.unit.test_worker_attention import random_step
from worker.backends import cpu_latent
from worker.backends.base import LatentHeads
from worker.backends.cpu import CpuBackend
from worker.context import BlockTable, RowSpan
from worker.layers.rope import Rope

BLOCKS = 200


def naive(
    queries: torch.Tensor, cache: LayerCache, heads: LatentHeads, spans: list[RowSpan], block_tokens: int
) -> torch.Tensor:
    """Return [tokens, heads * value_dim], each token over its row's lines up to itself, in float64."""
    keys, values = heads.keys.double(), heads.values.double()
    latent = heads.up.shape[1]
    out = torch.empty(*queries.shape[:2], heads.value_dim, dtype=torch.float64)
    for span in spans:
        ids = span.tables[0].ids
        lines = torch.stack(
            [cache.lines[ids[t // block_tokens] * block_tokens + t % block_tokens] for t in range(span.end)]
        ).double()
        for i in range(span.count):
            seen = lines[: span.start + i + 1]
            for head in range(queries.shape[1]):
                own = torch.cat((seen[:, :latent] @ keys[head].T, seen[:, latent:]), 1)
                weights = torch.softmax(own @ queries[span.offset + i, head].double() * heads.scale, 0)
                out[span.offset + i, head] = weights @ (seen[:, :latent] @ values[head].T)
    return out.flatten(1)


def run_step(draw: random.Random, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.set_num_threads(1)
    block_tokens = draw.choice([1, 3, 4, 16])
    latent, rope = draw.choice([8, 24]), draw.choice([2, 6])
    nope, value, count = draw.choice([2, 8]), draw.choice([2, 6, 16]), draw.choice([1, 3])
    spans = random_step(draw, block_tokens, BLOCKS, draw.randrange(1, 7))
    tokens = spans[-1].offset + spans[-1].count
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    cache = LayerCache(0, some(BLOCKS * block_tokens, latent + rope), 1, latent + rope, 0)
    heads = LatentHeads(some(count * (nope + value), latent) / latent**0.5, nope, value, 0.3)
    queries, lines = some(tokens, count, nope + rope), some(tokens, 5 + latent + rope)[:, 5:]
    still = torch.zeros(tokens, 3, rope // 2, dtype=dtype)
    still[:, 0] = 1
    gather_blocks = draw.choice([1, 2, 5, 100])
    backend = CpuBackend(gather_bytes=gather_blocks * block_tokens * (latent + rope) * 4)
    plan = backend.plan_attention(spans, 0, block_tokens, latent + rope)
    attention = backend.latent_attention(heads, cache)
    with torch.inference_mode():
        attention.rope_and_store(queries, lines, still, plan)
        found = attention.attend(queries, lines, plan)
    for span in spans:
        for i in range(span.count):
            block, inside = divmod(span.start + i, block_tokens)
            line = span.tables[0].ids[block] * block_tokens + inside
            assert torch.equal(cache.lines[line], lines[span.offset + i])
    return found.double(), naive(queries, cache, heads, spans, block_tokens)


@pytest.mark.parametrize("expanded_bytes", [1, 8 << 20])
def test_both_forms_match_their_naive_twin(monkeypatch: pytest.MonkeyPatch, expanded_bytes: int) -> None:
    monkeypatch.setattr(cpu_latent, "EXPANDED_BYTES", expanded_bytes)
    for seed in range(15):
        found, expected = run_step(random.Random(seed), torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_both_forms_match_their_naive_twin_at_length() -> None:
    for seed in range(100, 900):
        found, expected = run_step(random.Random(seed), torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_latent_attention_in_bfloat16_stays_near_its_twin() -> None:
    for seed in range(5):
        found, expected = run_step(random.Random(seed), torch.bfloat16)
        torch.testing.assert_close(found, expected, rtol=4e-2, atol=4e-2)


def test_neighbours_turn_in_the_complex_plane() -> None:
    tokens, heads, nope, latent, rope = 5, 3, 2, 8, 6
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(tokens, heads, nope + rope, generator=generator)
    lines = torch.randn(tokens, latent + rope, generator=generator)
    cache = LayerCache(0, torch.zeros(16, latent + rope), 1, latent + rope, 0)
    up = LatentHeads(torch.zeros(heads * 4, latent), nope, 2, 1.0)
    backend = CpuBackend()
    plan = backend.plan_attention([RowSpan(0, 0, tokens, (BlockTable([0]),))], 0, 16, latent + rope)
    rotation = Rope(100.0, rope, None, 16, torch.float32)(torch.arange(tokens))
    turn = torch.complex(rotation[:, 0].double(), rotation[:, 2].double())
    before = queries.clone(), lines.clone()
    backend.latent_attention(up, cache).rope_and_store(queries, lines, rotation, plan)
    assert torch.equal(queries[..., :nope], before[0][..., :nope])
    assert torch.equal(lines[:, :latent], before[1][:, :latent])
    for found, given, turned in (
        (queries[..., nope:], before[0][..., nope:], turn[:, None]),
        (lines[:, latent:], before[1][:, latent:], turn),
    ):
        pairs = torch.view_as_complex(given.double().unflatten(-1, (-1, 2)).contiguous()) * turned
        torch.testing.assert_close(
            found.double(), torch.view_as_real(pairs).flatten(-2), rtol=1e-6, atol=1e-6
        )
    assert torch.equal(cache.lines[:tokens], lines)
