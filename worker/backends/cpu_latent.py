"""Multi-head latent attention in plain torch: the reference. Two forms of the same sum.

A token's line is its latent c and its rotated key part r; head h has keys [Kₕ c, r] and values Vₕ c.
Expanded: keys and values are computed from the lines, in bounded pieces, and attended to as any.
Absorbed: q · Kₕ c = (Kₕᵀ q) · c, so queries are taken to the latents instead: all heads attend to the lines
themselves as to one KV head, and Vₕ is applied to what comes out. A row takes the form with fewer
multiply-adds: absorbed for a token, expanded for a chunk that shares the expansion among its queries.
Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from kv.tensors import LayerCache
from worker.backends import cpu_divided
from worker.backends.base import LatentHeads, Weight
from worker.backends.cpu_attention import PagedAttentionPlan, Part, attention, gathered, merge, store
from worker.backends.cpu_packed import unpacked_tiles
from worker.context import AttentionPlan

Product = Callable[[torch.Tensor, Weight], torch.Tensor]
"""Of x [tokens, in] and a weight."""

EXPANDED_BYTES = 8 << 20
"""Cached lines are expanded in pieces whose keys and values take at most this, in the workspace line."""


class CpuLatentAttention:
    """``LatentAttention`` on host memory. ``scratch`` is the backend's, for one gather."""

    def __init__(
        self, heads: LatentHeads, cache: LayerCache, linear: Product, scratch: torch.Tensor
    ) -> None:
        self._heads, self._cache, self._linear, self._scratch = heads, cache, linear, scratch
        latent = heads.up.shape[1]
        self._latent, self._rope = latent, cache.key_dim - latent
        # Scores and sums of a query over a line, in each form, and the expansion of a line.
        absorbed = 2 * latent + self._rope
        expanded = heads.nope_dim + self._rope + heads.value_dim
        expansion = latent * (heads.nope_dim + heads.value_dim)
        self._most_absorbed = max(expansion // (absorbed - expanded), 1) if absorbed > expanded else None

    def rope_and_store(
        self, queries: torch.Tensor, lines: torch.Tensor, rotation: torch.Tensor, plan: AttentionPlan
    ) -> None:
        """See ``LatentAttention.rope_and_store``."""
        rotate_pairs(queries[..., self._heads.nope_dim :], rotation)
        rotate_pairs(lines[:, None, self._latent :], rotation)
        if isinstance(plan, cpu_divided.DividedPlan):
            cpu_divided.store(lines, self._cache, plan)
            return
        assert isinstance(plan, PagedAttentionPlan)
        store(lines, self._cache, plan)

    def attend(self, queries: torch.Tensor, lines: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """See ``LatentAttention.attend``."""
        assert isinstance(plan, PagedAttentionPlan | cpu_divided.DividedPlan)
        most = self._most_absorbed
        few = [row for row, span in enumerate(plan.rows) if most is None or span.count <= most]
        is_few = [False] * len(plan.rows)
        asked = [self._padded(one) for one in torch.split(queries, [span.count for span in plan.rows])]
        for row, absorbed in zip(few, self._absorb([asked[row] for row in few]), strict=True):
            asked[row], is_few[row] = absorbed, True
        merged: dict[int, Part] = {}

        def fold(row: int, part: Part) -> None:
            merged[row] = merge(merged[row], part) if row in merged else part

        def see(row: int, seen: torch.Tensor, *, is_causal: bool = False) -> None:
            keys, values = _lines(seen) if is_few[row] else self._expand(seen)
            part = attention(asked[row], keys, values, is_causal=is_causal, scale=self._heads.scale)
            fold(row, (part[0][..., : self._latent], part[1]) if is_few[row] else part)

        for row, span in enumerate(plan.rows):
            if span.count > 1:
                see(row, lines[span.offset : span.offset + span.count], is_causal=True)
        if isinstance(plan, cpu_divided.DividedPlan):
            # Other ranks lack this one's Kₕ and Vₕ: queries are absorbed, what comes back is latent.
            question = cpu_divided.Question(
                queries.shape[1], self._latent + self._rope, self._latent, self._most_absorbed
            )
            for row, part in cpu_divided.ask(
                dict(enumerate(asked)),
                question,
                self._cache,
                plan,
                _lines,
                self._scratch,
                scale=self._heads.scale,
            ):
                fold(row, part)
            sources = cpu_divided.fetched(plan, question, self._cache, lines.dtype)
        else:
            sources = gathered(self._cache, plan.sources, plan.block_tokens, self._scratch, lines.dtype)
        for source, held in sources:
            for piece in source.pieces:
                seen = held[piece.first : piece.first + piece.length]
                for some in [seen] if is_few[piece.row] else torch.split(seen, self._piece_tokens(seen)):
                    see(piece.row, some)
        found = [merged[row][0] for row in range(len(plan.rows))]
        for row, values in zip(few, self._value([found[row] for row in few]), strict=True):
            found[row] = values
        return torch.cat([one[..., : self._heads.value_dim] for one in found]).flatten(1)

    def _absorb(self, queries: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return each row's queries [n, heads, latent + rope], made in one product."""
        if not queries:
            return ()
        nope = self._heads.nope_dim
        together = torch.cat(queries)[..., : nope + self._rope]
        taken = self._by_head(together[..., :nope], "thd,hdl->thl", slice(0, nope))
        absorbed = torch.cat((taken, together[..., nope:]), -1)
        return torch.split(absorbed, [len(one) for one in queries])

    def _value(self, sums: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return each row's values [n, heads, value_dim] of its sums over latents, made in one product."""
        if not sums:
            return ()
        values = self._by_head(torch.cat(sums), "thl,hvl->thv", slice(self._heads.nope_dim, None))
        return torch.split(values, [len(one) for one in sums])

    def _by_head(self, x: torch.Tensor, product: str, rows: slice) -> torch.Tensor:
        """Return the product of x [n, heads, …] with those rows of each head's K and V [., latent]."""
        up, of_head = self._heads.up, self._heads.nope_dim + self._heads.value_dim
        if isinstance(up, torch.Tensor):
            return torch.einsum(product, x, up.view(-1, of_head, self._latent)[:, rows])
        found, first = list[torch.Tensor](), 0
        for _, tile in unpacked_tiles(up, x.dtype, of_head):
            heads = tile.view(-1, of_head, self._latent)[:, rows]
            found.append(torch.einsum(product, x[:, first : first + len(heads)], heads))
            first += len(heads)
        return torch.cat(found, 1)

    def _expand(self, lines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [heads, tokens, width] of lines."""
        heads = self._heads
        expanded = self._linear(lines[:, : self._latent], heads.up)
        expanded = expanded.view(lines.shape[0], -1, heads.nope_dim + heads.value_dim)
        nope, values = expanded[..., : heads.nope_dim], expanded[..., heads.nope_dim :]
        shared = lines[:, None, self._latent :].expand(-1, nope.shape[1], -1)
        keys = torch.cat((nope, shared), -1)
        return self._padded(keys).transpose(0, 1), self._padded(values).transpose(0, 1)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        # The kernel wants keys and values of one width: zeros add nothing to scores, and are cut off sums.
        missing = max(self._heads.nope_dim + self._rope, self._heads.value_dim) - x.shape[-1]
        return functional.pad(x, (0, missing)) if missing else x

    def _piece_tokens(self, lines: torch.Tensor) -> int:
        heads = self._heads
        widest = max(heads.nope_dim + self._rope, heads.value_dim)
        token = heads.up.shape[0] + heads.up.shape[0] // (heads.nope_dim + heads.value_dim) * 2 * widest
        return max(EXPANDED_BYTES // (token * lines.element_size()), 1)


def _lines(lines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lines [tokens, width] as the keys and values of one head."""
    return lines[None], lines[None]


def rotate_pairs(x: torch.Tensor, rotation: torch.Tensor) -> None:
    """Rotate features (0, 1), (2, 3), … of x [tokens, heads, dim] in place."""
    pairs = x.view(*x.shape[:-1], -1, 2)
    crossed = pairs.flip(-1)
    cosines = rotation[:, None, 0, :, None]
    sines = rotation[:, None, 1:].transpose(-1, -2)
    pairs.mul_(cosines).addcmul_(crossed, sines)
