"""FlashInfer 0.6.14's attention operators, called without its Python package, which imports for seconds.

An operator is a shared library, ``DIRECTORY/NAME/NAME.so``; its arguments are those that the package's
``xqa.py`` and ``prefill.py`` pass. tvm_ffi takes torch's current stream from the tensors of each call.
"""

import ctypes
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kv.tensors import LayerCache
from worker.backends.cuda.attention_own import Rows, Shape

_ALL, _CAUSAL = 0, 1
_RAGGED_PAGE = 1
_LAYOUT_NHD = 0
_NO_WINDOW = -1
_XQA_DIMS = (64, 128, 256)
_SPREAD = 64 << 10  # alignment between the parts of a workspace, generously


class Operators:
    """Operators in a directory, loaded as they are asked for. Needs a current context."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def load(self, name: str) -> Any | None:
        """Return an operator's module, or None if it was not built."""
        if self._directory is None:
            return None
        path = self._directory / name / f"{name}.so"
        if not path.exists():
            return None
        # The operators take the driver's symbols from the process.
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
        import tvm_ffi

        return tvm_ffi.load_module(str(path))


def xqa_name(block_tokens: int, dim: int, ratio: int) -> str:
    """Return the name of the bf16 decode operator of a shape."""
    return (
        f"xqa_input_bf16_kv_cache_bf16_output_bf16_page_size_{block_tokens}_head_dim_{dim}"
        f"_head_group_ratio_{ratio}_use_sliding_window_False_use_spec_dec_False_spec_q_seq_len_1"
    )


def prefill_name(dim: int, is_fa3: bool, value_dim: int | None = None) -> str:
    """Return the name of the bf16 prefill operator of a head dim; ``value_dim``: where it is another."""
    values = dim if value_dim is None else value_dim
    return (
        "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32"
        f"_head_dim_qk_{dim}_head_dim_vo_{values}_posenc_0_use_swa_False_use_logits_cap_False_f16qk_False"
        f"{'_sm90' if is_fa3 else ''}"
    )


def takes_pages(shape: Shape) -> bool:
    """Return whether FlashInfer's operators can read the cache as it lies."""
    return shape.dtype == torch.bfloat16 and shape.key_dim == shape.value_dim and not shape.is_float8


def _pages(cache: LayerCache, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V as [blocks, block_tokens, kv_heads, dim] views."""
    lines, dim = cache.lines, shape.key_dim
    width = lines.shape[1]
    size = (lines.shape[0] // shape.block_tokens, shape.block_tokens, shape.kv_heads, dim)
    stride = (shape.block_tokens * width, width, dim, 1)
    offset = lines.storage_offset()
    return lines.as_strided(size, stride, offset), lines.as_strided(
        size, stride, offset + shape.kv_heads * dim
    )


class Xqa:
    """Decode on the tensor cores, reading lengths and pages on the device: capturable.

    How far a row is cut depends on the batch and on the context bound, not on lengths, and blocks beyond a
    row's length add nothing: a captured graph stays right as rows grow.
    """

    def __init__(self, module: Any, shape: Shape, multiprocessors: int, blocks_each: int) -> None:
        self._run = module.xqa_wrapper
        self._shape = shape
        self._blocks = multiprocessors * blocks_each
        self.counters = shape.max_rows * shape.kv_heads
        """int32 zeros needed; they are zero again after each launch."""
        # A part per block: the heads' outputs, their dims padded, and 128 bytes each of maxima and sums.
        padded = next(dim for dim in _XQA_DIMS if dim >= shape.value_dim)
        self.scratch_bytes = self._blocks * (shape.ratio * padded * 2 + 256) + _SPREAD

    @staticmethod
    def find(operators: Operators, shape: Shape) -> Any | None:
        """Return the operator for a shape, if it is there."""
        if not takes_pages(shape):
            return None
        return operators.load(xqa_name(shape.block_tokens, shape.key_dim, shape.ratio))

    def launch(
        self,
        rows: Rows,
        page_table: torch.Tensor,
        scratch: torch.Tensor,
        counters: torch.Tensor,
        queries: torch.Tensor,
        cache: LayerCache,
        out: torch.Tensor,
    ) -> None:
        """Attend ``queries`` [rows, heads * dim]; ``page_table`` is [rows, max_blocks]."""
        shape = self._shape
        keys, values = _pages(cache, shape)
        self._run(
            False,  # the FP8 kernel
            self._blocks,
            shape.kv_heads,
            0,  # sliding window
            1.0,  # the scale of the scores, beside 1 / sqrt(dim)
            None,
            out,
            1.0,
            queries,
            None,  # attention sinks
            keys,
            values,
            None,
            None,
            page_table,
            shape.max_context,
            rows.kv_lengths,
            rows.count,
            1.0,  # the scale of the cache
            None,
            1,  # query tokens a row
            None,
            counters,
            scratch,
            True,  # programmatic dependent launch: the kernel waits as ours do
        )


@dataclass(slots=True)
class _PlanSpace:
    """What one plan is copied through; its event has passed once the copies are over."""

    work: torch.Tensor
    pinned_work: torch.Tensor
    indices: torch.Tensor
    pinned_indices: torch.Tensor
    copied: torch.cuda.Event


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """One step's plan for some rows; good until the plan after the next."""

    info: Any
    work: torch.Tensor
    q_starts: torch.Tensor
    page_starts: torch.Tensor
    last_pages: torch.Tensor


def _new_space(work_bytes: int, indices: int, device: torch.device) -> _PlanSpace:
    return _PlanSpace(
        torch.zeros(work_bytes, dtype=torch.uint8, device=device),
        torch.zeros(work_bytes, dtype=torch.uint8, pin_memory=True),
        torch.zeros(indices, dtype=torch.int32, device=device),
        torch.zeros(indices, dtype=torch.int32, pin_memory=True),
        torch.cuda.Event(blocking=True),  # type: ignore[no-untyped-call]
    )


def _fa3_work_bytes(step_tokens: int, max_rows: int, heads: int) -> int:
    # Seven int32 a tile of 128 queries and head; many tiles share one schedule for all heads.
    tiles = step_tokens // 128 + max_rows + 1
    return 28 * max(min(tiles, 4096) * heads, tiles) + _SPREAD


class PagedPrefill:
    """Rows of many query tokens. Two plans' memory alternates: one is filled while the other is read."""

    def __init__(self, module: Any, shape: Shape, is_fa3: bool, device: torch.device) -> None:
        self._plan, self._run = module.plan, module.paged_run
        self._shape = shape
        self.is_fa3 = is_fa3
        self._scale = 1.0 / math.sqrt(shape.key_dim)
        # FA2 is not let split the keys, and FA3 does not: nothing is written here.
        self._unused = torch.zeros(16, dtype=torch.uint8, device=device)
        work_bytes, indices = self._work_bytes(), 3 * shape.max_rows + 2
        self._spaces = [_new_space(work_bytes, indices, device) for _ in range(2)]
        self.device_bytes = 2 * (work_bytes + 4 * indices)

    @staticmethod
    def find(operators: Operators, shape: Shape, is_fa3: bool) -> Any | None:
        """Return the operator for a shape, if it is there and takes it."""
        # FA3 reads the queries through a tensor map, whose strides a single head would break.
        if not takes_pages(shape) or (is_fa3 and shape.heads == 1):
            return None
        return operators.load(prefill_name(shape.key_dim, is_fa3))

    def plan(self, q_starts: list[int], kv_lengths: list[int]) -> PrefillPlan:
        """Plan rows whose queries begin at ``q_starts`` [rows + 1], from 0, and their contexts' lengths."""
        shape = self._shape
        rows = len(kv_lengths)
        self._spaces.reverse()
        space = self._spaces[0]
        if not space.copied.query():  # type: ignore[no-untyped-call]
            space.copied.synchronize()
        page_starts = [0]
        for length in kv_lengths:
            page_starts.append(page_starts[-1] + -(-length // shape.block_tokens))
        last_pages = [(length - 1) % shape.block_tokens + 1 for length in kv_lengths]
        host = torch.tensor([*q_starts, *page_starts, *last_pages], dtype=torch.int32)
        space.pinned_indices[: host.numel()].copy_(host)
        space.indices[: host.numel()].copy_(space.pinned_indices[: host.numel()], non_blocking=True)
        arguments = [
            self._unused,
            space.work,
            space.pinned_work,
            host[: rows + 1],
            host[rows + 1 : 2 * rows + 2],
            torch.tensor(kv_lengths, dtype=torch.int32),
            q_starts[-1],
            rows,
            shape.heads,
            shape.kv_heads,
            shape.block_tokens,
            False,  # for a CUDA graph
            shape.key_dim,
            shape.value_dim,
            True,  # causal
            _NO_WINDOW,
        ]
        if not self.is_fa3:
            arguments += [-1, True, 0]  # split size, never split, blocks of others
        info = self._plan(*arguments)
        space.copied.record()
        q_starts_device, page_starts_device, last_pages_device = (
            space.indices[: rows + 1],
            space.indices[rows + 1 : 2 * rows + 2],
            space.indices[2 * rows + 2 : 3 * rows + 2],
        )
        return PrefillPlan(info, space.work, q_starts_device, page_starts_device, last_pages_device)

    def launch(
        self,
        plan: PrefillPlan,
        pages: torch.Tensor,
        queries: torch.Tensor,
        cache: LayerCache,
        out: torch.Tensor,
    ) -> None:
        """Attend ``queries`` [tokens, heads * dim]; ``pages``: block ids of the rows, one after another."""
        shape = self._shape
        keys, values = _pages(cache, shape)
        # No prefixes, no item lists, no scales: what is None or neutral below.
        extra: tuple[float | None, ...]
        if self.is_fa3:
            extra = (None, None, None, None, 0.0, self._scale, 1.0, 0)
        else:
            extra = (None,) * 8 + (0.0, self._scale, 1.0, 1.0, 0)
        self._run(
            self._unused,
            plan.work,
            plan.info,
            queries.view(-1, shape.heads, shape.key_dim),
            keys,
            values,
            plan.q_starts,
            plan.page_starts,
            pages,
            plan.last_pages,
            out.view(-1, shape.heads, shape.value_dim),
            None,  # log-sum-exp
            _CAUSAL,
            _LAYOUT_NHD,
            _NO_WINDOW,
            False,  # programmatic dependent launch
            *extra,
        )

    def _work_bytes(self) -> int:
        shape = self._shape
        if self.is_fa3:
            return _fa3_work_bytes(shape.step_tokens, shape.max_rows, shape.heads)
        # Three int32 a tile of 16 packed queries at least, and the rows' starts.
        tiles = shape.step_tokens * shape.ratio // 16 + shape.max_rows + 1
        return 12 * tiles + 4 * shape.max_rows + _SPREAD


@dataclass(frozen=True, slots=True)
class RaggedPlan:
    """One launch of a step; good until the step after the next begins."""

    info: Any
    work: torch.Tensor
    q_starts: torch.Tensor
    kv_starts: torch.Tensor
    firsts: torch.Tensor
    """What was given beside the starts."""
    mask: int


class RaggedPrefill:
    """FlashAttention 3 over keys and values that lie row after row, which may have a dim of their own each.

    A step may have several launches, each with a plan; the plans of two steps have memory of their own.
    """

    def __init__(
        self,
        module: Any,
        *,
        heads: int,
        key_dim: int,
        value_dim: int,
        scale: float,
        max_rows: int,
        step_tokens: int,
        device: torch.device,
        kv_heads: int | None = None,
        plans: int = 2,
    ) -> None:
        """``kv_heads``: fewer than ``heads``, where these share keys. ``plans``: of a step, at first."""
        self._plan, self._run = module.plan, module.ragged_run
        self._kv_heads = heads if kv_heads is None else kv_heads
        self._heads, self._key_dim, self._value_dim, self._scale = heads, key_dim, value_dim, scale
        self._device = device
        self._unused = torch.zeros(16, dtype=torch.uint8, device=device)
        self._work_bytes = _fa3_work_bytes(step_tokens, max_rows, heads)
        self._indices = 3 * max_rows + 2
        # The latent's second is for the first piece of what is cached; more are made as they are needed.
        self._spaces = [[self._new_space() for _ in range(plans)] for _ in range(2)]
        self._used = 0

    @property
    def device_bytes(self) -> int:
        """Device memory that was allocated for good."""
        return sum(map(len, self._spaces)) * (self._work_bytes + 4 * self._indices)

    def begin(self) -> None:
        """Begin a step: the plans of the step before the last may be written over."""
        self._spaces.reverse()
        self._used = 0

    def plan(
        self, q_starts: list[int], kv_starts: list[int], firsts: list[int], *, is_causal: bool
    ) -> RaggedPlan:
        """Plan rows whose queries begin at ``q_starts``, keys at ``kv_starts``, [rows + 1], from 0.

        Causal: a row's last query is its last key's. ``firsts``, [rows] or empty, is taken to the device.
        """
        spaces, rows = self._spaces[0], len(q_starts) - 1
        if self._used == len(spaces):
            spaces.append(self._new_space())
        space = spaces[self._used]
        self._used += 1
        if not space.copied.query():  # type: ignore[no-untyped-call]
            space.copied.synchronize()
        host = torch.tensor([*q_starts, *kv_starts, *firsts], dtype=torch.int32)
        count = host.numel()
        space.pinned_indices[:count].copy_(host)
        space.indices[:count].copy_(space.pinned_indices[:count], non_blocking=True)
        lengths = [after - before for before, after in pairwise(kv_starts)]
        info = self._plan(
            self._unused,
            space.work,
            space.pinned_work,
            host[: rows + 1],
            host[rows + 1 : 2 * rows + 2],
            torch.tensor(lengths, dtype=torch.int32),
            q_starts[-1],
            rows,
            self._heads,
            self._kv_heads,
            _RAGGED_PAGE,
            False,  # for a CUDA graph
            self._key_dim,
            self._value_dim,
            is_causal,
            _NO_WINDOW,
        )
        space.copied.record()
        return RaggedPlan(
            info,
            space.work,
            space.indices[: rows + 1],
            space.indices[rows + 1 : 2 * rows + 2],
            space.indices[2 * rows + 2 : count],
            _CAUSAL if is_causal else _ALL,
        )

    def launch(
        self,
        plan: RaggedPlan,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        log_sums: torch.Tensor | None = None,
    ) -> None:
        """Attend ``queries`` to ``keys`` and ``values``, all [tokens, heads, dim], into ``out``.

        Tokens and heads of these may lie apart, at multiples of 16 bytes. A tile may read beyond a row's
        last key: what is there counts nothing, but must be finite. ``log_sums``, float32 [tokens, heads],
        gets the base-2 logarithm of each softmax's denominator.
        """
        self._run(
            self._unused,
            plan.work,
            plan.info,
            queries,
            keys,
            values,
            plan.q_starts,
            plan.kv_starts,
            out,
            log_sums,
            plan.mask,
            _LAYOUT_NHD,
            _NO_WINDOW,
            False,  # programmatic dependent launch
            # No prefixes, no item lists, no scale of the values, no cap.
            *(None, None, None, None, 0.0, self._scale, 1.0, 0),
        )

    def _new_space(self) -> _PlanSpace:
        return _new_space(self._work_bytes, self._indices, self._device)
