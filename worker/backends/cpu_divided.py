"""Attention where ranks keep the positions of the same heads' KV by turns (DCP), in plain torch.

Rank r of c keeps the positions p with p % c = r: of a row's first n tokens ⌈(n - r) / c⌉, which fill its
pages without a gap. So a rank's own part of a row is a row of its own, with the same block table and
smaller pages.

Every rank computes the keys and values of new tokens and stores its share. New tokens attend to each other
at once, as ever; the cached context of their row is reached in the one of two ways that moves fewer bytes:

- asked: queries go to all ranks of the group, each attends for all heads to the positions that it keeps,
  and what they found is merged by log-sum-exp in a reduce-scatter, which leaves each rank its own heads. A
  single token always asks, its own position among the kept ones.
- fetched: pages of cached context are gathered from all ranks, in pieces of a bounded size, and attended
  to by each rank's own heads.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from kv.tensors import LayerCache
from models.memory import DIVIDED_BYTES
from protocol.topology import Topology
from worker.backends.cpu_attention import (
    Context,
    Part,
    Source,
    attention,
    gathered,
    merge,
    new_lines,
    plan_sources,
)
from worker.backends.cpu_float8 import read_pages, store_rounded
from worker.comm import Collectives
from worker.context import AttentionPlan, RowSpan

KeysValues = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of lines [tokens, width]: [KV heads, tokens, dim] each."""


@dataclass(frozen=True, slots=True)
class Division:
    """A rank's share of positions, and its ways to those that keep the others."""

    group: Collectives
    size: int
    index: int

    @classmethod
    def of(cls, topology: Topology, rank: int, group: Collectives | None) -> "Division | None":
        """Return a rank's share; None where it keeps all positions."""
        if group is None:
            return None
        return cls(group, topology.dcp, topology.dcp_rank(topology.tp_rank(rank)))

    def kept(self, tokens: int) -> int:
        """Return how many of a row's first ``tokens`` this rank keeps."""
        return (tokens - self.index + self.size - 1) // self.size


@dataclass(frozen=True, slots=True)
class Question:
    """What a layer asks the other ranks with: sizes that decide which way is taken."""

    heads: int
    """Of this rank."""
    query_dim: int
    found_dim: int
    """Of a sum over values, as it is sent back."""
    most_tokens: int | None = None
    """Rows of more tokens do not ask; None: any may."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Rows that ask together."""

    rows: tuple[int, ...]
    sources: tuple[Source, ...]
    """Of the lines that this rank keeps."""


@dataclass(frozen=True, slots=True)
class Ways:
    """How the rows of a step reach their cached context."""

    asked: tuple[Asked, ...]
    fetched: tuple[Source, ...]
    """Of whole blocks in order of position, as they lie once they are fetched."""


class DividedPlan(AttentionPlan):
    """One step's attention in one group."""

    __slots__ = ("_gather_blocks", "_group", "_is_converted", "_ways", "block_tokens", "division", "kept",
                 "lines", "rows")  # fmt: skip

    def __init__(
        self,
        spans: list[RowSpan],
        group: int,
        block_tokens: int,
        division: Division,
        gather_blocks: int,
        *,
        is_converted: bool,
    ) -> None:
        """``gather_blocks``: pages of this rank that are copied together at most."""
        self.rows, self.block_tokens, self.division = tuple(spans), block_tokens, division
        self._group, self._gather_blocks, self._is_converted = group, gather_blocks, is_converted
        self._ways: dict[tuple[Question, int, int], Ways] = {}
        own = [self._own(span) for span in spans]
        self.lines = new_lines(own, group, self.page_tokens)
        """Cache lines of the new tokens that this rank keeps, int64."""
        self.kept = torch.cat([self._places(span) for span in spans])
        """Their places among the step's tokens."""

    @property
    def page_tokens(self) -> int:
        """Tokens of a block that this rank keeps."""
        return self.block_tokens // self.division.size

    def _own(self, span: RowSpan) -> RowSpan:
        start, end = self.division.kept(span.start), self.division.kept(span.end)
        return RowSpan(span.offset, start, end - start, span.tables)

    def _places(self, span: RowSpan) -> torch.Tensor:
        division = self.division
        first = division.kept(span.start) * division.size + division.index
        return torch.arange(first, max(span.end, first), division.size) + (span.offset - span.start)

    def ways(self, question: Question, cache: LayerCache, itemsize: int) -> Ways:
        """Return the way of each row, the same on all ranks. ``itemsize``: bytes of what is computed in."""
        page_bytes = cache.lines.nbytes // self._num_pages(cache)
        key = question, page_bytes, itemsize
        if key not in self._ways:
            self._ways[key] = self._choose(question, page_bytes, itemsize)
        return self._ways[key]

    def _num_pages(self, cache: LayerCache) -> int:
        return cache.lines.shape[0] if cache.is_float8 else cache.lines.shape[0] // self.page_tokens

    def _choose(self, question: Question, page_bytes: int, itemsize: int) -> Ways:
        size, block = self.division.size, self.block_tokens
        # A rank sends queries to each other one and takes them, and sends back sums and takes its own.
        moved = question.heads * ((question.query_dim + question.found_dim) * itemsize + 4 * size)
        # Queries of all heads, what was found for them, and the weighed and ordered copy that is sent.
        held = size * question.heads * (question.query_dim + 3 * question.found_dim) * 4
        most = max(DIVIDED_BYTES // held, 1)
        asking, fetching = list[int](), list[int]()
        for row, span in enumerate(self.rows):
            if span.count == 1:
                asking.append(row)
            elif span.start:
                few = span.count <= min(most, question.most_tokens or most)
                pages = -(-span.start // block)
                asks = few and span.count * moved <= pages * page_bytes
                (asking if asks else fetching).append(row)
        # Received as stored, copied into order as computed, and this rank's own pages.
        fetch_blocks = max(DIVIDED_BYTES // (size * page_bytes * (2 + 4)), 1)
        return Ways(
            tuple(self._asked(rows) for rows in self._packed(asking, most)),
            plan_sources(
                [
                    Context(row, self.rows[row].tables[self._group], 0, self.rows[row].start)
                    for row in fetching
                ],
                block,
                fetch_blocks,
                is_copied=True,
            ),
        )

    def _packed(self, rows: list[int], most: int) -> Iterator[tuple[int, ...]]:
        together, tokens = list[int](), 0
        for row in rows:
            count = self.rows[row].count
            if together and tokens + count > most:
                yield tuple(together)
                together, tokens = [], 0
            together.append(row)
            tokens += count
        if together:
            yield tuple(together)

    def _asked(self, rows: tuple[int, ...]) -> Asked:
        contexts = []
        for row in rows:
            span = self.rows[row]
            # More than one new token see their own beside the cache.
            end = self.division.kept(span.end if span.count == 1 else span.start)
            contexts.append(Context(row, span.tables[self._group], 0, end))
        sources = plan_sources(
            contexts, self.page_tokens, self._gather_blocks, is_copied=self._is_converted
        )
        return Asked(rows, sources)


def store(lines: torch.Tensor, cache: LayerCache, plan: DividedPlan) -> None:
    """Write this rank's share of new lines [tokens, width]; all are rounded in place as the cache is."""
    if cache.is_float8:
        store_rounded(lines, cache, plan.lines, plan.kept)
        return
    if cache.lines.dtype != lines.dtype:
        lines.copy_(lines.to(cache.lines.dtype))
    cache.lines.index_copy_(0, plan.lines, lines[plan.kept].to(cache.lines.dtype))


def ask(
    queries: Mapping[int, torch.Tensor],
    question: Question,
    cache: LayerCache,
    plan: DividedPlan,
    keys_values: KeysValues,
    scratch: torch.Tensor,
    *,
    scale: float | None = None,
) -> Iterator[tuple[int, Part]]:
    """Give each row that asks its part of what all ranks keep, by this rank's heads.

    ``queries``: by row, [n, heads, query_dim].
    """
    for asked in plan.ways(question, cache, next(iter(queries.values())).element_size()).asked:
        counts = [plan.rows[row].count for row in asked.rows]
        mine = torch.cat([queries[row] for row in asked.rows])
        # [tokens, heads of all ranks, query_dim]: they share the KV head that this rank keeps a part of.
        everyone = plan.division.group.all_gather(mine).transpose(0, 1).flatten(1, 2)
        of_row = dict(zip(asked.rows, torch.split(everyone, counts), strict=True))
        merged: dict[int, Part] = {}
        for source, lines in gathered(cache, asked.sources, plan.page_tokens, scratch, mine.dtype):
            keys, values = keys_values(lines)
            for piece in source.pieces:
                seen = slice(piece.first, piece.first + piece.length)
                part = attention(of_row[piece.row], keys[:, seen], values[:, seen], scale=scale)
                before = merged.get(piece.row)
                merged[piece.row] = part if before is None else merge(before, part)
        # Let go of all heads' queries before sums are weighed, and of sums before the next rows ask.
        shape = everyone.shape[:2]
        del everyone, of_row
        found, lse = mine.new_zeros(*shape, question.found_dim), torch.full(shape, -torch.inf)
        places = dict(zip(asked.rows, torch.split(torch.arange(len(mine)), counts), strict=True))
        for row in tuple(merged):
            out, own_lse = merged.pop(row)
            found[places[row]] = out[..., : question.found_dim]
            lse[places[row]] = own_lse.reshape(1, -1) if len(out) == 1 else own_lse[0].t()
        own, whole_lse = merge_over(plan.division, found, lse)
        del found
        for row, at in places.items():
            yield row, (own[at], whole_lse[at].t()[None])


def merge_over(division: Division, found: torch.Tensor, lse: torch.Tensor) -> Part:
    """Merge what the ranks found, [tokens, heads of all ranks, dim], and return this rank's heads of it.

    ``lse``: float32 [tokens, heads of all ranks], -inf where a rank keeps nothing; that of the whole
    is returned beside it, [tokens, heads]. Some rank keeps something of every token's context.
    """
    tokens, heads, dim = found.shape
    own = heads // division.size
    whole = torch.logsumexp(division.group.all_gather(lse), 0)
    weighed = (found * torch.exp(lse - whole).unsqueeze(-1)).to(found.dtype)
    by_rank = weighed.view(tokens, division.size, own, dim).transpose(0, 1).contiguous()
    mine = division.group.reduce_scatter(by_rank)
    return mine[0], whole[:, division.index * own : (division.index + 1) * own]


def fetched(
    plan: DividedPlan, question: Question, cache: LayerCache, dtype: torch.dtype
) -> Iterator[tuple[Source, torch.Tensor]]:
    """Give the sources of rows that fetch, each with its lines [tokens, width] in order of position."""
    width, division = cache.heads * (cache.key_dim + cache.value_dim), plan.division
    pages = cache.lines if cache.is_float8 else cache.lines.view(-1, plan.page_tokens * width)
    for source in plan.ways(question, cache, dtype.itemsize).fetched:
        assert source.blocks is not None
        received = division.group.all_gather(pages.index_select(0, source.blocks))
        ordered = torch.empty(
            len(source.blocks), plan.page_tokens, division.size, width, dtype=dtype
        )  # Position p of a block is token p // c of rank p % c.
        for rank, theirs in enumerate(received):
            if cache.is_float8:
                read_pages(cache, theirs, ordered[:, :, rank])
            else:
                ordered[:, :, rank] = theirs.view(-1, plan.page_tokens, width)
        yield source, ordered.view(-1, width)


def attend(qkv: torch.Tensor, cache: LayerCache, plan: DividedPlan, scratch: torch.Tensor) -> torch.Tensor:
    """Return [tokens, heads * value_dim]; see ``Backend.attend``. ``scratch`` holds one gather's bytes."""
    stored = cache.heads * (cache.key_dim + cache.value_dim)
    queries = qkv[:, :-stored].view(qkv.shape[0], -1, cache.key_dim)
    of_row = dict(enumerate(torch.split(queries, [span.count for span in plan.rows])))
    merged: dict[int, Part] = {}

    def fold(row: int, part: Part) -> None:
        merged[row] = merge(merged[row], part) if row in merged else part

    for row, span in enumerate(plan.rows):
        if span.count > 1:
            keys, values = cache.keys_values(qkv[span.offset : span.offset + span.count, -stored:])
            fold(row, attention(of_row[row], keys, values, is_causal=True))
    question = Question(queries.shape[1], cache.key_dim, cache.value_dim)
    for row, part in ask(of_row, question, cache, plan, cache.keys_values, scratch):
        fold(row, part)
    for source, lines in fetched(plan, question, cache, qkv.dtype):
        keys, values = cache.keys_values(lines)
        for piece in source.pieces:
            seen = slice(piece.first, piece.first + piece.length)
            fold(piece.row, attention(of_row[piece.row], keys[:, seen], values[:, seen]))
    return torch.cat([merged[row][0] for row in range(len(plan.rows))]).flatten(1)
