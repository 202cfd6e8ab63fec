"""Attention over positions that ranks keep by turns, against a naive twin that has all of them.

Ranks are threads; each has its own heads and caches, and all the same new tokens. A history of steps fills
the caches through shuffled block tables, so a line that is stored twice, nowhere or elsewhere shows.
"""

import random
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv.tensors import LayerCache
from protocol.topology import Topology
from tests.unit.comm_layouts import on_all_ranks
from worker.backends import cpu_divided
from worker.backends.base import LatentHeads
from worker.backends.cpu import CpuBackend
from worker.backends.cpu_divided import DividedPlan, Division, Question, merge_over
from worker.comm import Communicator, thread_group
from worker.context import BlockTable, RowSpan

LATENT, ROPE, NOPE, VALUE = 8, 2, 4, 6
DIM = 6
STEPS = st.lists(
    st.lists(st.sampled_from([0, 1, 1, 2, 5, 9, 20]), min_size=3, max_size=3), min_size=1, max_size=5
)


@dataclass(frozen=True)
class History:
    """Steps of some rows: new tokens of each row, in order of the rows."""

    size: int
    page_tokens: int
    heads: int
    steps: list[list[int]]
    seed: int
    is_latent: bool

    @property
    def width(self) -> int:
        return LATENT + ROPE if self.is_latent else 2 * DIM

    @property
    def block_tokens(self) -> int:
        return self.size * self.page_tokens

    def tables(self) -> list[BlockTable]:
        rows = list(zip(*self.steps, strict=True))
        counts = [-(-sum(row) // self.block_tokens) + 1 for row in rows]
        free = list(range(sum(counts)))
        draw = random.Random(self.seed)
        if draw.random() < 0.7:
            draw.shuffle(free)
        return [BlockTable([free.pop(0) for _ in range(count)]) for count in counts]

    def spans(self) -> list[list[RowSpan]]:
        """Return the rows of each step."""
        tables, starts = self.tables(), [0] * len(self.steps[0])
        found = []
        for counts in self.steps:
            spans, offset = [], 0
            for row, count in enumerate(counts):
                if count:
                    spans.append(RowSpan(offset, starts[row], count, (tables[row],)))
                    starts[row] += count
                    offset += count
            found.append(spans)
        return [spans for spans in found if spans]

    def some(self, what: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed * 1000 + what))

    def lines(self, step: int, tokens: int) -> torch.Tensor:
        return self.some(step, tokens, self.width)

    def queries(self, step: int, rank: int, tokens: int) -> torch.Tensor:
        dim = NOPE + ROPE if self.is_latent else DIM
        return self.some(100 + step * 10 + rank, tokens, self.heads, dim)

    def up(self, rank: int) -> LatentHeads:
        return LatentHeads(self.some(900 + rank, self.heads * (NOPE + VALUE), LATENT), NOPE, VALUE, 0.3)


def run(history: History, comm: Communicator) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what one rank finds in each step, and its cache."""
    blocks = sum(len(table.ids) for table in history.tables())
    dims = (history.width, 0) if history.is_latent else (DIM, DIM)
    cache = LayerCache(0, torch.zeros(blocks * history.page_tokens, history.width), 1, *dims)
    division = Division.of(comm.topology, comm.rank, comm.dcp)
    assert division is not None
    backend = CpuBackend(
        gather_bytes=random.Random(history.seed).choice([1, 3, 100])
        * history.page_tokens
        * history.width
        * 4,
        division=division,
    )
    latents = backend.latent_attention(history.up(comm.rank), cache) if history.is_latent else None
    found = []
    with torch.inference_mode():
        for step, spans in enumerate(history.spans()):
            tokens = spans[-1].offset + spans[-1].count
            lines, queries = history.lines(step, tokens), history.queries(step, comm.rank, tokens)
            plan = backend.plan_attention(spans, 0, history.block_tokens, history.width)
            still = torch.zeros(tokens, 3, (ROPE if history.is_latent else DIM) // 2)
            still[:, 0] = 1
            if latents is not None:
                latents.rope_and_store(queries, lines, still, plan)
                found.append(latents.attend(queries, lines, plan))
            else:
                qkv = torch.cat((queries.flatten(1), lines), 1)
                backend.rope_and_store(qkv, still, cache, plan)
                found.append(backend.attend(qkv, cache, plan))
    return found, cache.lines


def naive(history: History, rank: int) -> list[torch.Tensor]:
    """Return what a rank's heads see in all positions, one query at a time, in float64."""
    known: dict[int, torch.Tensor] = {}
    found = []
    for step, spans in enumerate(history.spans()):
        tokens = spans[-1].offset + spans[-1].count
        lines = history.lines(step, tokens).double()
        queries = history.queries(step, rank, tokens).double()
        width = VALUE if history.is_latent else DIM
        out = torch.empty(tokens, history.heads, width, dtype=torch.float64)
        for span in spans:
            row = span.tables[0].ids[0]
            before = known.get(row, lines[:0])
            known[row] = torch.cat((before, lines[span.offset : span.offset + span.count]))
            for i in range(span.count):
                seen = known[row][: span.start + i + 1]
                for head in range(history.heads):
                    keys, values, scale = seen[:, :DIM], seen[:, DIM:], DIM**-0.5
                    if history.is_latent:
                        up = history.up(rank)
                        latent = seen[:, :LATENT]
                        keys = torch.cat((latent @ up.keys[head].double().T, seen[:, LATENT:]), 1)
                        values, scale = latent @ up.values[head].double().T, up.scale
                    weights = torch.softmax(keys @ queries[span.offset + i, head] * scale, 0)
                    out[span.offset + i, head] = weights @ values
        found.append(out.flatten(1))
    return found


def check(history: History) -> None:
    topology = Topology(tp=history.size, dcp=history.size)
    ranks = on_all_ranks(topology, lambda comm: run(history, comm))
    for rank, (found, _) in enumerate(ranks):
        for own, expected in zip(found, naive(history, rank), strict=True):
            torch.testing.assert_close(own.double(), expected, rtol=1e-4, atol=1e-5)
    # Each line is where its position says, and nothing is anywhere else.
    expected_lines = [torch.zeros_like(lines) for _, lines in ranks]
    for step, spans in enumerate(history.spans()):
        lines = history.lines(step, spans[-1].offset + spans[-1].count)
        for span in spans:
            for i in range(span.count):
                block, inside = divmod(span.start + i, history.block_tokens)
                line = span.tables[0].ids[block] * history.page_tokens + inside // history.size
                expected_lines[(span.start + i) % history.size][line] = lines[span.offset + i]
    for (_, lines), expected in zip(ranks, expected_lines, strict=True):
        assert torch.equal(lines, expected)


def histories(is_latent: bool) -> st.SearchStrategy[History]:
    return st.builds(
        History,
        size=st.sampled_from([2, 3, 4, 8]),
        page_tokens=st.integers(1, 4),
        heads=st.integers(1, 2),
        steps=STEPS.filter(lambda steps: any(map(any, steps))),
        seed=st.integers(0, 1000),
        is_latent=st.just(is_latent),
    )


@pytest.mark.parametrize("is_latent", [False, True])
@pytest.mark.parametrize("divided_bytes", [1, 20_000, 1 << 24])
def test_all_ranks_see_all_positions(is_latent: bool, divided_bytes: int) -> None:
    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(histories(is_latent))
    def hold(history: History) -> None:
        check(history)

    with patch.object(cpu_divided, "DIVIDED_BYTES", divided_bytes):
        hold()


@pytest.mark.long
@pytest.mark.parametrize("is_latent", [False, True])
@pytest.mark.parametrize("divided_bytes", [1, 5_000, 20_000, 1 << 24])
def test_all_ranks_see_all_positions_at_length(is_latent: bool, divided_bytes: int) -> None:
    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(histories(is_latent))
    def hold(history: History) -> None:
        check(history)

    with patch.object(cpu_divided, "DIVIDED_BYTES", divided_bytes):
        hold()


@given(st.integers(1, 16), st.integers(0, 5000))
def test_shares_of_a_row_are_all_of_it(size: int, tokens: int) -> None:
    topology = Topology(tp=size, dcp=size)
    comm = thread_group(Topology(tp=2, dcp=2))[0].dcp
    shares = [Division.of(topology, rank, comm) for rank in range(size)]
    kept = [share.kept(tokens) for share in shares if share is not None]
    assert sum(kept) == tokens
    assert max(kept) - min(kept) <= 1
    assert kept == [len(range(rank, tokens, size)) for rank in range(size)]


def test_partials_merge_to_the_whole() -> None:
    size, tokens, heads, dim = 4, 5, 2, 3
    generator = torch.Generator().manual_seed(0)
    scores = 40 * torch.randn(size, tokens, size * heads, 7, generator=generator)
    values = torch.randn(size, tokens, size * heads, 7, dim, generator=generator)
    # A rank that keeps nothing of a token's context, and a token of which one rank alone keeps something.
    scores[1, 2] = scores[[0, 1, 3], 4] = -torch.inf
    every = scores.double().transpose(0, 1).transpose(1, 2).flatten(2)
    weights = torch.softmax(every, -1)
    expected = torch.einsum("thk,thkd->thd", weights, values.double().permute(1, 2, 0, 3, 4).flatten(2, 3))

    def work(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        division = Division.of(comm.topology, comm.rank, comm.dcp)
        assert division is not None
        lse = torch.logsumexp(scores[comm.rank], -1)
        part = torch.softmax(scores[comm.rank], -1).nan_to_num(0)
        return merge_over(division, torch.einsum("thk,thkd->thd", part, values[comm.rank]), lse)

    for rank, (found, lse) in enumerate(on_all_ranks(Topology(tp=size, dcp=size), work)):
        own = slice(rank * heads, (rank + 1) * heads)
        torch.testing.assert_close(found.double(), expected[:, own], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), torch.logsumexp(every, -1)[:, own], rtol=1e-6, atol=1e-6)


def test_the_way_with_fewer_bytes_is_taken_and_pieces_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    comms = thread_group(Topology(tp=8, dcp=8))
    width, page, block = 576, 2, 16
    tables = (BlockTable(range(1000)),)
    counts = [1, 1, 64, 900, 64, 5]
    starts = [0, 15_000, 200, 15_000, 15_000, 0]
    offsets = [sum(counts[:row]) for row in range(len(counts))]
    spans = [RowSpan(o, s, n, tables) for o, s, n in zip(offsets, starts, counts, strict=True)]
    question = Question(heads=8, query_dim=576, found_dim=512, most_tokens=170)
    cache = LayerCache(0, torch.zeros(1000 * page, width, dtype=torch.bfloat16), 1, width, 0)
    found = []
    for comm in comms:
        division = Division.of(comm.topology, comm.rank, comm.dcp)
        assert division is not None
        plan = DividedPlan(spans, 0, block, division, 50, is_converted=False)
        ways = plan.ways(question, cache, 2)
        assert plan.ways(question, cache, 2) is ways
        pages = sum(len(source.blocks) for source in ways.fetched if source.blocks is not None)
        found.append(([asked.rows for asked in ways.asked], len(ways.fetched), pages))
    # 64 tokens move 64 * 8 * (1088 * 2 + 32) bytes, contexts 2304 a block; 900 tokens are too many to ask.
    # Of what is held, 8 * 8 * (576 + 3 * 512) * 4 bytes a token, 30 tokens are the most together.
    assert all(ways == found[0] for ways in found)
    assert found[0][0] == [(0, 1)]
    assert found[0][2] == -(-200 // block) + 2 * -(-15_000 // block)
    monkeypatch.setattr(cpu_divided, "DIVIDED_BYTES", 1 << 26)
    assert division is not None
    plan = DividedPlan(spans, 0, block, division, 50, is_converted=False)
    assert [asked.rows for asked in plan.ways(question, cache, 2).asked] == [(0, 1, 4)]
