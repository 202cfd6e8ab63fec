"""Paged attention in plain torch: a row's context in pieces, merged by log-sum-exp.

A row attends to its own new tokens causally and to what was cached before without a mask, so no
mask is ever made. Cached context that is one run of blocks is read in place; scattered blocks of
all rows are gathered together in bounded pieces. Two parts of a softmax merge exactly:
o = Σ oᵢ · exp(lseᵢ − lse), lse = log Σ exp(lseᵢ).
"""

from dataclasses import dataclass

import torch

from kv.tensors import LayerCache
from worker.context import AttentionPlan, RowSpan

Part = tuple[torch.Tensor, torch.Tensor]
"""Attention to a part of the context, [n, heads, value_dim], and its scores' log-sum-exp, float32."""

# The public function does not return the log-sum-exp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class Piece:
    """Lines [first, first + length) of a source, seen by one row."""

    row: int
    first: int
    length: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where pieces lie: the cache itself, or copies of some of its blocks."""

    blocks: torch.Tensor | None
    """Block ids to be gathered, int64; None: the cache itself."""
    pieces: tuple[Piece, ...]


class PagedAttentionPlan(AttentionPlan):
    """One step's attention in one group."""

    __slots__ = ("block_tokens", "lines", "rows", "sources")

    def __init__(
        self,
        rows: tuple[RowSpan, ...],
        lines: torch.Tensor | int,
        sources: tuple[Source, ...],
        block_tokens: int,
    ) -> None:
        self.rows = rows
        self.lines = lines
        """Cache line of every new token, [tokens] int64; the first one's where they are neighbours."""
        self.sources = sources
        self.block_tokens = block_tokens


def plan_attention(
    spans: list[RowSpan], group: int, block_tokens: int, gather_blocks: int
) -> PagedAttentionPlan:
    """Prepare a step; at most ``gather_blocks`` blocks are copied together at a time."""
    in_place: list[Piece] = []
    gathered: list[Source] = []
    blocks: list[int] = []
    pieces: list[Piece] = []
    for row, span in enumerate(spans):
        table = span.tables[group]
        # A single token reads its own key from the cache too; a chunk sees its own beside the cache.
        left = span.end if span.count == 1 else span.start
        if table.is_run:
            if left:
                in_place.append(Piece(row, table.ids[0] * block_tokens, left))
            continue
        first = 0
        while left:
            if len(blocks) == gather_blocks:
                gathered.append(_gather(blocks, pieces))
                blocks, pieces = [], []
            taken = min(-(-left // block_tokens), gather_blocks - len(blocks))
            length = min(left, taken * block_tokens)
            pieces.append(Piece(row, len(blocks) * block_tokens, length))
            blocks += table.ids[first : first + taken]
            first += taken
            left -= length
    if pieces:
        gathered.append(_gather(blocks, pieces))
    sources = (Source(None, tuple(in_place)), *gathered)
    return PagedAttentionPlan(tuple(spans), _new_lines(spans, group, block_tokens), sources, block_tokens)


def _gather(blocks: list[int], pieces: list[Piece]) -> Source:
    return Source(torch.tensor(blocks), tuple(pieces))


def _new_lines(spans: list[RowSpan], group: int, block_tokens: int) -> torch.Tensor | int:
    lines: list[int] = []
    for span in spans:
        table = span.tables[group]
        if table.is_run:
            first = table.ids[0] * block_tokens + span.start
            if len(spans) == 1:
                return first
            lines.extend(range(first, first + span.count))
            continue
        ids, position = table.ids, span.start
        while position < span.end:
            block, inside = divmod(position, block_tokens)
            length = min(block_tokens - inside, span.end - position)
            first = ids[block] * block_tokens + inside
            lines.extend(range(first, first + length))
            position += length
    return torch.tensor(lines)


def attend(
    qkv: torch.Tensor, cache: LayerCache, plan: PagedAttentionPlan, scratch: torch.Tensor
) -> torch.Tensor:
    """Return [tokens, heads * value_dim]; see ``Backend.attend``. ``scratch`` holds one gather's bytes."""
    stored = cache.heads * (cache.key_dim + cache.value_dim)
    queries = qkv[:, :-stored].view(qkv.shape[0], -1, cache.key_dim)
    merged: dict[int, Part] = {}
    for row, span in enumerate(plan.rows):
        if span.count > 1:
            own = slice(span.offset, span.offset + span.count)
            keys, values = cache.keys_values(qkv[own, -stored:])
            merged[row] = _attention(queries[own], keys, values, is_causal=True)
    for source in plan.sources:
        if not source.pieces:
            continue
        lines = cache.lines
        if source.blocks is not None:
            pages = lines.view(-1, plan.block_tokens * lines.shape[1])
            copies = scratch.view(lines.dtype)[: len(source.blocks) * pages.shape[1]].view(
                -1, pages.shape[1]
            )
            lines = torch.index_select(pages, 0, source.blocks, out=copies).view(-1, lines.shape[1])
        keys, values = cache.keys_values(lines)
        for piece in source.pieces:
            span, end = plan.rows[piece.row], piece.first + piece.length
            part = _attention(
                queries[span.offset : span.offset + span.count],
                keys[:, piece.first : end],
                values[:, piece.first : end],
            )
            before = merged.get(piece.row)
            merged[piece.row] = part if before is None else _merge(before, part)
    return torch.cat([merged[row][0] for row in range(len(plan.rows))]).flatten(1)


def _attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, is_causal: bool = False
) -> Part:
    """Return a part; keys and values are [heads, tokens, dim]."""
    n, heads, dim = queries.shape
    if n == 1:
        # The heads that share a KV head are its queries: each key is read once for all of them.
        grouped = queries.view(1, keys.shape[0], -1, dim)
        out, lse = _flash(grouped, keys[None], values[None])
        return out.reshape(1, heads, -1), lse
    out, lse = _flash(queries.transpose(0, 1)[None], keys[None], values[None], 0.0, is_causal)
    return out[0].transpose(0, 1), lse


def _merge(a: Part, b: Part) -> Part:
    n, heads, _ = a[0].shape
    lse = torch.logaddexp(a[1], b[1])

    def weight(part: Part) -> torch.Tensor:
        # One query: [1, KV heads, its queries]; more: [1, heads, n].
        exponent = torch.exp(part[1] - lse)
        return exponent.reshape(1, heads, 1) if n == 1 else exponent[0].t().unsqueeze(-1)

    out = a[0] * weight(a) + b[0] * weight(b)
    return out.to(a[0].dtype), lse
