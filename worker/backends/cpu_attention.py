"""Paged attention in plain torch: a row's context in pieces, merged by log-sum-exp.

A row attends to its own new tokens causally and to what was cached before without a mask, so no
mask is ever made: where a layer group is chunked, a row whose new tokens cross a border is taken in
parts, each with what its chunk has before it. Cached context that is one run of blocks is read in
place; scattered blocks of all rows, and all of a cache in another dtype, are gathered together in
bounded pieces. Two parts of a softmax merge exactly: o = Σ oᵢ · exp(lseᵢ − lse), lse = log Σ exp(lseᵢ).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kv.tensors import LayerCache
from worker.backends.cpu_float8 import read_blocks, store_rounded
from worker.context import AttentionPlan, BlockTable, RowSpan

Part = tuple[torch.Tensor, torch.Tensor]
"""Attention to a part of the context, [n, heads, value_dim], and its scores' log-sum-exp, float32."""

# The public function does not return the log-sum-exp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class Piece:
    """Lines [first, first + length) of a source, seen by one row or part of one."""

    row: int
    first: int
    length: int


@dataclass(frozen=True, slots=True)
class Context:
    """Tokens [first, end) of a row's cache, seen by its new ones."""

    row: int
    table: BlockTable
    first: int
    end: int


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
        """Rows; parts of rows where they cross a border."""
        self.lines = lines
        """Cache line of every new token, [tokens] int64; the first one's where they are neighbours."""
        self.sources = sources
        self.block_tokens = block_tokens


def plan_attention(
    spans: list[RowSpan],
    group: int,
    block_tokens: int,
    gather_blocks: int,
    *,
    is_converted: bool = False,
    chunk: int | None = None,
) -> PagedAttentionPlan:
    """Prepare a step; at most ``gather_blocks`` blocks are copied together at a time.

    ``is_converted``: nothing can be read in place. ``chunk``: tokens of a chunked group's chunks.
    """
    rows = spans if chunk is None else [part for span in spans for part in _parts(span, chunk)]
    contexts: list[Context] = []
    for row, span in enumerate(rows):
        seen = 0 if chunk is None else span.start - span.start % chunk
        # A single token reads its own key from the cache too; more see their own beside the cache.
        end = span.end if span.count == 1 else span.start
        contexts.append(Context(row, span.tables[group], seen, end))
    sources = plan_sources(contexts, block_tokens, gather_blocks, is_copied=is_converted)
    lines: torch.Tensor | int = new_lines(spans, group, block_tokens)
    if len(spans) == 1 and spans[0].tables[group].is_run and not is_converted:
        lines = spans[0].tables[group].ids[0] * block_tokens + spans[0].start
    return PagedAttentionPlan(tuple(rows), lines, sources, block_tokens)


def plan_sources(
    contexts: list[Context], block_tokens: int, gather_blocks: int, *, is_copied: bool
) -> tuple[Source, ...]:
    """Return where what rows see lies; at most ``gather_blocks`` blocks are copied together.

    ``is_copied``: nothing can be read in place.
    """
    in_place: list[Piece] = []
    gathered: list[Source] = []
    blocks: list[int] = []
    pieces: list[Piece] = []
    for context in contexts:
        left, ids = context.end - context.first, context.table.ids
        if context.table.is_run and not is_copied:
            if left:
                in_place.append(Piece(context.row, ids[0] * block_tokens + context.first, left))
            continue
        first, skipped = divmod(context.first, block_tokens)
        while left:
            if len(blocks) == gather_blocks:
                gathered.append(_gather(blocks, pieces))
                blocks, pieces = [], []
            taken = min(-(-(skipped + left) // block_tokens), gather_blocks - len(blocks))
            length = min(left, taken * block_tokens - skipped)
            pieces.append(Piece(context.row, len(blocks) * block_tokens + skipped, length))
            blocks += ids[first : first + taken]
            first += taken
            left -= length
            skipped = 0
    if pieces:
        gathered.append(_gather(blocks, pieces))
    return (Source(None, tuple(in_place)), *gathered) if in_place else tuple(gathered)


def _parts(span: RowSpan, chunk: int) -> Iterator[RowSpan]:
    """Yield a row's new tokens cut at the borders of chunks."""
    start = span.start
    while start < span.end:
        end = min(start - start % chunk + chunk, span.end)
        yield RowSpan(span.offset + start - span.start, start, end - start, span.tables)
        start = end


def _gather(blocks: list[int], pieces: list[Piece]) -> Source:
    return Source(torch.tensor(blocks), tuple(pieces))


def new_lines(spans: list[RowSpan], group: int, block_tokens: int) -> torch.Tensor:
    """Return the cache lines of new tokens, int64."""
    lines: list[int] = []
    for span in spans:
        ids, position = span.tables[group].ids, span.start
        while position < span.end:
            block, inside = divmod(position, block_tokens)
            length = min(block_tokens - inside, span.end - position)
            first = ids[block] * block_tokens + inside
            lines.extend(range(first, first + length))
            position += length
    return torch.tensor(lines, dtype=torch.int64)


def store(lines: torch.Tensor, cache: LayerCache, plan: PagedAttentionPlan) -> None:
    """Write new lines [tokens, width] to the cache.

    Where it has another dtype they are rounded in place: a chunk attends to its own keys and values as
    later ones will find them.
    """
    stored = lines
    if cache.is_float8:
        assert isinstance(plan.lines, torch.Tensor)
        store_rounded(lines, cache, plan.lines)
        return
    if cache.lines.dtype != lines.dtype:
        stored = lines.to(cache.lines.dtype)
        lines.copy_(stored)
    if isinstance(plan.lines, int):
        cache.lines[plan.lines : plan.lines + lines.shape[0]] = stored
    else:
        cache.lines.index_copy_(0, plan.lines, stored)


def gathered(
    cache: LayerCache,
    sources: tuple[Source, ...],
    block_tokens: int,
    scratch: torch.Tensor,
    dtype: torch.dtype,
) -> Iterator[tuple[Source, torch.Tensor]]:
    """Give each source with its lines in ``dtype``; copies lie in ``scratch``, one by one."""
    for source in sources:
        if source.blocks is None:
            yield source, cache.lines
        elif cache.is_float8:
            yield source, read_blocks(cache, source.blocks, scratch, dtype)
        else:
            yield source, _copies(cache.lines, source.blocks, block_tokens, scratch, dtype)


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
            merged[row] = attention(queries[own], keys, values, is_causal=True)
    for source, lines in gathered(cache, plan.sources, plan.block_tokens, scratch, qkv.dtype):
        keys, values = cache.keys_values(lines)
        for piece in source.pieces:
            span, end = plan.rows[piece.row], piece.first + piece.length
            part = attention(
                queries[span.offset : span.offset + span.count],
                keys[:, piece.first : end],
                values[:, piece.first : end],
            )
            before = merged.get(piece.row)
            merged[piece.row] = part if before is None else merge(before, part)
    return torch.cat([merged[row][0] for row in range(len(plan.rows))]).flatten(1)


def _copies(
    lines: torch.Tensor, blocks: torch.Tensor, block_tokens: int, scratch: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return copies of some blocks' lines in ``dtype``, made in ``scratch``."""
    pages = lines.view(-1, block_tokens * lines.shape[1])
    count = len(blocks) * pages.shape[1]
    converted = scratch[: count * dtype.itemsize].view(dtype)
    if dtype == lines.dtype:
        copies = converted
    else:
        copies = scratch[count * dtype.itemsize :][: count * lines.dtype.itemsize].view(lines.dtype)
    torch.index_select(pages, 0, blocks, out=copies.view(-1, pages.shape[1]))
    if copies is not converted:
        converted.copy_(copies)
    return converted.view(-1, lines.shape[1])


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Part:
    """Return a part of queries [n, heads, dim]; keys and values are [KV heads, tokens, dim].

    Scores are multiplied with ``scale``, 1 / sqrt(dim) where it is None.
    """
    n, heads, dim = queries.shape
    if n == 1:
        # The heads that share a KV head are its queries: each key is read once for all of them.
        grouped = queries.view(1, keys.shape[0], -1, dim)
        out, lse = _flash(grouped, keys[None], values[None], scale=scale)
        return out.reshape(1, heads, -1), lse
    out, lse = _flash(queries.transpose(0, 1)[None], keys[None], values[None], 0.0, is_causal, scale=scale)
    return out[0].transpose(0, 1), lse


def merge(a: Part, b: Part) -> Part:
    """Return attention to two disjoint parts of the context."""
    n, heads, _ = a[0].shape
    lse = torch.logaddexp(a[1], b[1])

    def weight(part: Part) -> torch.Tensor:
        # One query: [1, KV heads, its queries]; more: [1, heads, n].
        exponent = torch.exp(part[1] - lse)
        return exponent.reshape(1, heads, 1) if n == 1 else exponent[0].t().unsqueeze(-1)

    out = a[0] * weight(a) + b[0] * weight(b)
    return out.to(a[0].dtype), lse
