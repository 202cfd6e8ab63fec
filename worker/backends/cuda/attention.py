"""Causal attention over the paged cache: planned once a step and KV group, run once a layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from kv.tensors import LayerCache
from worker.backends.cuda.attention_expanded import ExpandedPrefill
from worker.backends.cuda.attention_own import OwnDecode, OwnPrefill, Rows, Shape
from worker.backends.cuda.attention_paths import (
    DECODE_PATHS,
    PREFILL_PATHS,
    DecodePath,
    DecodeRule,
    PrefillPath,
)
from worker.backends.cuda.attention_runs import RunPrefill
from worker.backends.cuda.flashinfer import Operators, PagedPrefill, Xqa
from worker.backends.cuda.launch import Kernels
from worker.backends.cuda.long_rows import split_runs
from worker.context import AttentionPlan

_LARGEST_DIM = 256
_XQA_BLOCKS_EACH: dict[DecodePath, int] = {"xqa": 1, "xqa_wide": 2}


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens [first, first + count) of a step, attended by one launch."""

    first: int
    count: int
    launch: Callable[[torch.Tensor, LayerCache, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class PagedPlan(AttentionPlan):
    """Attention of one step in one KV group."""

    tokens: int
    parts: tuple[_Part, ...]


def _decode_paths(
    kernels: Kernels,
    operators: Operators,
    shape: Shape,
    rules: tuple[DecodeRule, ...],
    device: torch.device,
) -> dict[DecodeRule, Xqa | OwnDecode]:
    """Return the paths that some number of rows will take, in order of preference."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    paths: dict[DecodeRule, Xqa | OwnDecode] = {}
    unserved = set(range(1, shape.max_rows + 1))
    for rule in rules:
        rows = range(rule.min_rows, min(rule.max_rows, shape.max_rows) + 1)
        if unserved.isdisjoint(rows):
            continue
        if rule.path in _XQA_BLOCKS_EACH:
            module = Xqa.find(operators, shape)
            if module is None:
                continue
            paths[rule] = Xqa(module, shape, multiprocessors, _XQA_BLOCKS_EACH[rule.path])
        elif OwnDecode.fits(shape, rule.path):
            paths[rule] = OwnDecode(kernels, shape, multiprocessors, rows, rule.split_tokens, rule.path)
        else:
            continue
        if math.isinf(rule.below_context):
            unserved.difference_update(rows)
    return paths


def _prefill_path(
    kernels: Kernels,
    operators: Operators,
    shape: Shape,
    preferred: tuple[PrefillPath, ...],
    device: torch.device,
    expanded_tokens: int,
) -> PagedPrefill | ExpandedPrefill | OwnPrefill:
    plain = replace(shape, is_float8=False)
    for path in preferred:
        if path == "tiled":
            break
        module = PagedPrefill.find(operators, plain, path == "fa3")
        if module is not None:
            paged = PagedPrefill(module, plain, path == "fa3", device)
            if not shape.is_float8:
                return paged
            return ExpandedPrefill(kernels, paged, shape, expanded_tokens, device)
    return OwnPrefill(kernels, shape)


class CudaAttention:
    """Attention of one KV group. Owns its workspace, so steps run one after another on one stream."""

    def __init__(
        self,
        kernels: Kernels,
        operators: Path | None,
        *,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        block_tokens: int,
        max_rows: int,
        max_blocks: int,
        step_tokens: int,
        device: torch.device,
        is_float8: bool = False,
        expanded_tokens: int = 0,
        decode_paths: tuple[DecodeRule, ...] = DECODE_PATHS,
        prefill_paths: tuple[PrefillPath, ...] = PREFILL_PATHS,
    ) -> None:
        """Choose kernels and allocate their workspace.

        ``heads`` and ``kv_heads`` are this rank's; dims are multiples of 8 up to 256. ``operators`` is the
        directory of FlashInfer's operators; one that is not there is not used. ``max_blocks`` is the width
        of the block tables, ``step_tokens`` the most tokens of a step. ``is_float8``: the cache is; then
        prefill copies rows of ``expanded_tokens`` tokens at most together in bf16. Errors: ``CudaError``.
        """
        assert heads % kv_heads == 0, (heads, kv_heads)
        assert key_dim % 8 == value_dim % 8 == 0, (key_dim, value_dim)
        assert max(key_dim, value_dim) <= _LARGEST_DIM, (key_dim, value_dim)
        # A float8 line begins at a multiple of 8 bytes, at which eight of its elements are read.
        assert not is_float8 or block_tokens % 8 == 0, block_tokens
        shape = Shape(
            heads,
            kv_heads,
            key_dim,
            value_dim,
            dtype,
            block_tokens,
            max_rows,
            max_blocks,
            step_tokens,
            is_float8,
        )
        self._shape = shape
        found = Operators(operators)
        self._decode = _decode_paths(kernels, found, shape, decode_paths, device)
        self._prefill = _prefill_path(kernels, found, shape, prefill_paths, device, expanded_tokens)
        self._tiled = OwnPrefill(kernels, shape)
        self._runs: RunPrefill | None = None
        if isinstance(self._prefill, PagedPrefill) and self._prefill.is_fa3:
            module = RunPrefill.find(found, shape)
            self._runs = None if module is None else RunPrefill(module, shape, device)
        self._gather = kernels.get("attention", "gather_blocks", "PPPPPii")

        paths = self._decode.values()
        self._scratch = torch.zeros(
            max(path.scratch_bytes for path in paths) + 16, dtype=torch.uint8, device=device
        )
        self._counters = torch.zeros(max(path.counters for path in paths), dtype=torch.int32, device=device)
        uses_table = any(isinstance(path, Xqa) for path in paths)
        uses_list = not isinstance(self._prefill, OwnPrefill)
        self._page_table = torch.zeros(
            # The second half is for the plan of a mixed step's last tokens, beside the step's own.
            (2 * max_rows if uses_table else 0, max_blocks),
            dtype=torch.int32,
            device=device,
        )
        self._page_list = torch.zeros(
            max_rows * max_blocks if uses_list else 0, dtype=torch.int32, device=device
        )

    @property
    def workspace_bytes(self) -> int:
        """Device memory that was allocated for good."""
        tensors = (self._scratch, self._counters, self._page_table, self._page_list)
        planned = 0 if isinstance(self._prefill, OwnPrefill) else self._prefill.device_bytes
        planned += 0 if self._runs is None else self._runs.device_bytes
        return sum(tensor.nbytes for tensor in tensors) + planned

    def decode_path(self, rows: int) -> DecodePath:
        """Return the path that serves so many rows of any context."""
        return self.decode_rules(rows)[-1].path

    def decode_rule(self, rows: int, mean_context: float) -> DecodeRule:
        """Return what serves a decode step of so many rows, with so many tokens each in the mean."""
        return next(rule for rule in self._decode if rule.serves(rows, mean_context))

    def decode_rules(self, rows: int) -> tuple[DecodeRule, ...]:
        """Return what serves so many rows, whatever their contexts."""
        found = [rule for rule in self._decode if rule.min_rows <= rows <= rule.max_rows]
        last = next(i for i, rule in enumerate(found) if math.isinf(rule.below_context))
        return tuple(found[: last + 1])

    @property
    def prefill_path(self) -> PrefillPath:
        """Return the path of rows with several tokens."""
        if isinstance(self._prefill, OwnPrefill):
            return "tiled"
        return "fa3" if self._prefill.is_fa3 else "fa2"

    def plan_decode(
        self,
        rows: int,
        slots: torch.Tensor,
        kv_lengths: torch.Tensor,
        block_tables: torch.Tensor,
        rule: DecodeRule | None = None,
        *,
        is_beside_mixed: bool = False,
    ) -> PagedPlan:
        """Prepare a step of one token a row. Capturable: everything that changes is read on the device.

        ``slots`` and ``kv_lengths`` are int32 [rows] or longer, ``block_tables`` int32 [slots, max_blocks];
        ``rule`` is one of ``decode_rules``, None the one for any context. ``is_beside_mixed``: a plan of
        ``plan_mixed`` for the same step stays good.
        Run once outside of a capture first: operators load themselves at their first launch.
        """
        served = Rows(rows, slots, kv_lengths, block_tables)
        line = self._shape.max_rows if is_beside_mixed else 0
        part = self._decode_part(line, 0, served, rule or self.decode_rules(rows)[-1])
        return PagedPlan(rows, (part,))

    def plan_mixed(
        self,
        q_starts: list[int],
        kv_lengths: list[int],
        slots_device: torch.Tensor,
        q_starts_device: torch.Tensor,
        kv_lengths_device: torch.Tensor,
        block_tables: torch.Tensor,
        first_blocks: Sequence[int | None] = (),
    ) -> PagedPlan:
        """Prepare a step of rows with any number of tokens, at least one each; not capturable.

        Rows of one token at the beginning and at the end of the step are decoded, which is much faster for
        them; a scheduler does well to put them there. ``first_blocks``: of each row whose blocks are
        neighbours in ascending order, None for the others; () where it is not known.
        """
        counts = [after - before for before, after in pairwise(q_starts)]
        total = len(counts)
        assert total == len(kv_lengths), (q_starts, kv_lengths)
        assert min(counts) >= 1, counts
        begin = next((row for row in range(total) if counts[row] > 1), total)
        end = next((row for row in range(total, begin, -1) if counts[row - 1] > 1), begin)
        parts, paged = [], range(begin, end)
        if self._runs is not None and first_blocks:
            self._runs.begin()
            paged, alone = split_runs(paged, counts, first_blocks)
            for row, first_block in alone.items():
                run = self._runs.plan(counts[row], kv_lengths[row], first_block)
                parts.append(_Part(q_starts[row], counts[row], partial(self._runs.launch, run)))
        spans = ((0, begin, True), (paged.start, paged.stop, False), (end, total, True))
        for first, last, is_decode in spans:
            if first == last:
                continue
            rows = Rows(last - first, slots_device[first:last], kv_lengths_device[first:last], block_tables)
            if is_decode:
                rule = self.decode_rule(rows.count, sum(kv_lengths[first:last]) / rows.count)
                parts.append(self._decode_part(first, q_starts[first], rows, rule))
            else:
                fitting = last
                if isinstance(self._prefill, ExpandedPrefill):
                    fitting = first + self._prefill.fitting(kv_lengths[first:last])
                for start, stop, prefill in ((first, fitting, self._prefill), (fitting, last, self._tiled)):
                    if start < stop:
                        some = slice(start, stop)
                        here = Rows(stop - start, slots_device[some], kv_lengths_device[some], block_tables)
                        ends = slice(start, stop + 1)
                        lengths, on_device = kv_lengths[some], q_starts_device[ends]
                        parts.append(self._prefill_part(prefill, here, q_starts[ends], lengths, on_device))
        return PagedPlan(q_starts[-1], tuple(parts))

    def run(
        self,
        queries: torch.Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return attention of ``queries`` (contiguous, ``tokens * heads * key_dim`` elements).

        The result is [tokens, heads * value_dim]. Keys and values of the step are in the cache already.
        """
        assert isinstance(plan, PagedPlan)
        shape = self._shape
        queries = queries.view(-1, shape.heads * shape.key_dim)
        assert queries.shape[0] == plan.tokens, (queries.shape, plan.tokens)
        assert queries.is_contiguous(), queries.stride()
        if out is None:
            size = (plan.tokens, shape.heads * shape.value_dim)
            out = torch.empty(size, dtype=shape.dtype, device=queries.device)
        for part in plan.parts:
            if part.count == plan.tokens:
                part.launch(queries, cache, out)
            else:
                tokens = slice(part.first, part.first + part.count)
                part.launch(queries[tokens], cache, out[tokens])
        return out

    def _decode_part(self, line: int, first_token: int, rows: Rows, rule: DecodeRule) -> _Part:
        path = self._decode[rule]
        scratch, counters = self._scratch, self._counters
        if isinstance(path, OwnDecode):
            return _Part(first_token, rows.count, partial(path.launch, rows, scratch, counters))
        table = self._page_table[line : line + rows.count]
        self._gather_blocks(rows, 0, table)
        return _Part(first_token, rows.count, partial(path.launch, rows, table, scratch, counters))

    def _prefill_part(
        self,
        prefill: PagedPrefill | ExpandedPrefill | OwnPrefill,
        rows: Rows,
        q_starts: list[int],
        kv_lengths: list[int],
        q_starts_device: torch.Tensor,
    ) -> _Part:
        first, count = q_starts[0], q_starts[-1] - q_starts[0]
        launch: Callable[[torch.Tensor, LayerCache, torch.Tensor], None]
        if isinstance(prefill, OwnPrefill):
            tiles = OwnPrefill.tiles([after - before for before, after in pairwise(q_starts)])
            launch = partial(prefill.launch, rows, tiles, q_starts_device)
        else:
            plan = prefill.plan([start - first for start in q_starts], kv_lengths)
            self._gather_blocks(rows, plan.page_starts, self._page_list)
            if isinstance(prefill, ExpandedPrefill):
                num_pages = prefill.pages(kv_lengths)
                launch = partial(prefill.launch, plan, num_pages, self._page_list)
            else:
                launch = partial(prefill.launch, plan, self._page_list)
        return _Part(first, count, launch)

    def _gather_blocks(self, rows: Rows, starts: torch.Tensor | int, out: torch.Tensor) -> None:
        shape = self._shape
        self._gather(
            (rows.count,),
            128,
            (
                rows.block_tables,
                rows.slots,
                rows.kv_lengths,
                starts,
                out,
                shape.max_blocks,
                shape.block_tokens,
            ),
        )
