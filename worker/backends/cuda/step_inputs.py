"""A step's tensors, made on the device from the few numbers that come from the host.

Slot ``max_rows`` is scratch: rows that only pad a graph name it, and nothing goes to the cache for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from worker.backends.cuda.launch import Kernels

Ints = NDArray[np.int32]

_THREADS = 256
_BUFFERS = 4
_UPDATE_INTS = 4
_UPDATES_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step on the device."""

    slots: torch.Tensor
    """int32 [rows]."""
    q_starts: torch.Tensor
    """int32 [rows + 1]: first token of each row among the step's."""
    kv_lengths: torch.Tensor
    """int32 [rows]: tokens in the context, this step's included."""
    token_ids: torch.Tensor
    """int64 [tokens]."""
    positions: torch.Tensor
    """int64 [tokens]."""
    lines: torch.Tensor
    """int64 [groups, tokens]: the cache line each token is written to, -1: none."""
    logit_tokens: torch.Tensor
    """int64 [logits]: the tokens of the step whose logits are wanted."""
    logit_slots: torch.Tensor
    """int32 [logits]: the slots of their rows."""
    logit_lengths: torch.Tensor
    """int32 [logits]: the ``kv_lengths`` of their rows."""


class StepInputs:
    """Owner of the batch state that stays on the device: block tables and last tokens, by slot.

    Used by one thread, always with the same current stream.
    """

    def __init__(
        self,
        kernels: Kernels,
        device: torch.device,
        *,
        groups: int,
        max_rows: int,
        max_blocks: int,
        max_tokens: int,
        block_tokens: int,
    ) -> None:
        """``max_blocks``: entries of a block table; ``max_tokens``: of one step, all rows together."""
        self._groups, self._max_rows = groups, max_rows
        self._max_blocks, self._block_tokens = max_blocks, block_tokens
        rows = max_rows + 1
        self.block_tables = torch.zeros(groups, rows, max_blocks, dtype=torch.int32, device=device)
        """int32 [groups, max_rows + 1, max_blocks]."""
        self.last_tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        """int64 [max_rows + 1]: what each slot's row sampled last; the sampler writes it."""
        # slots, starts, q_starts, at most one logit a token; then two numbers a token.
        size = 3 * rows + 1 + 3 * max(max_tokens, rows)
        self._inputs = torch.zeros(size, dtype=torch.int32, device=device)
        self._updates = torch.zeros(_UPDATES_AT_ONCE * _UPDATE_INTS, dtype=torch.int32, device=device)
        # In a decode step every row is a token.
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._tokens = torch.arange(rows, dtype=torch.int64, device=device)
        self._host_inputs = _PinnedBuffers(size)
        self._host_updates = _PinnedBuffers(_UPDATES_AT_ONCE * _UPDATE_INTS)
        self._change = kernels.get("step", "change_tables", "PPiii")
        self._decode = kernels.get("step", "decode_inputs", "PPPPPPPiiiii")
        self._mixed = kernels.get("step", "mixed_inputs", "PPPPPPPPPPiiiiiii")

    def change_tables(self, updates: Ints) -> None:
        """Write block ids: ``updates`` [count, 4] of group, slot, index in the table, block.

        No place is named twice in one call. Not for capture.
        """
        flat = np.ascontiguousarray(updates, dtype=np.int32).reshape(-1)
        piece = _UPDATES_AT_ONCE * _UPDATE_INTS
        for first in range(0, flat.size, piece):
            part = flat[first : first + piece]
            self._host_updates.send((part,), self._updates)
            count = part.size // _UPDATE_INTS
            self._change(
                (_blocks(count),),
                _THREADS,
                (self._updates, self.block_tables, count, self._max_rows, self._max_blocks),
            )

    def send_decode(self, slots: Ints, starts: Ints) -> None:
        """Bring what the next ``decode`` of as many rows (or a replay of it) reads. Not for capture.

        ``starts``: tokens of each row in the cache; a padded row has slot ``max_rows`` and start 0.
        """
        assert slots.size == starts.size <= self._max_rows + 1, (slots.size, starts.size)
        self._host_inputs.send((slots, starts), self._inputs)

    def decode(self, rows: int) -> StepTensors:
        """Make the tensors of a step in which each row has one token, its last one sampled. Capturable."""
        inputs = self._inputs
        token_ids, positions, lines, kv_lengths = made = self._empty(rows, rows)
        self._decode(
            (_blocks(rows),),
            _THREADS,
            (inputs, self.block_tables, self.last_tokens, *made, rows, *self._sizes()),
        )
        return StepTensors(
            slots=inputs[:rows],
            q_starts=self._starts[: rows + 1],
            kv_lengths=kv_lengths,
            token_ids=token_ids,
            positions=positions,
            lines=lines,
            logit_tokens=self._tokens[:rows],
            logit_slots=inputs[:rows],
            logit_lengths=kv_lengths,
        )

    def mixed(
        self, slots: Ints, starts: Ints, counts: Ints, token_ids: Ints, logit_tokens: Ints
    ) -> StepTensors:
        """Send a step of any shape and make its tensors. Not for capture.

        ``counts`` [rows]: tokens of each row, at least 1; ``token_ids`` [their sum], row after row: below 0
        the last token that the row's slot sampled; ``logit_tokens``: the tokens whose logits are wanted.
        ``slots`` and ``q_starts`` of what comes back are good until the next step's numbers are sent.
        """
        rows, tokens, logits = slots.size, token_ids.size, logit_tokens.size
        q_starts = np.zeros(rows + 1, dtype=np.int32)
        np.cumsum(counts, out=q_starts[1:])
        assert q_starts[-1] == tokens, (int(q_starts[-1]), tokens)
        token_rows = np.repeat(np.arange(rows, dtype=np.int32), counts)
        inputs, device = self._inputs, self._inputs.device
        self._host_inputs.send((slots, starts, q_starts, logit_tokens, token_rows, token_ids), inputs)
        ids, positions, lines, kv_lengths = made = self._empty(rows, tokens)
        wanted = torch.empty(logits, dtype=torch.int64, device=device)
        logit_slots = torch.empty(logits, dtype=torch.int32, device=device)
        logit_lengths = torch.empty(logits, dtype=torch.int32, device=device)
        self._mixed(
            (_blocks(max(tokens, rows, logits)),),
            _THREADS,
            (
                *(inputs, self.block_tables, self.last_tokens, *made, wanted, logit_slots, logit_lengths),
                *(rows, tokens, logits, *self._sizes()),
            ),
        )
        return StepTensors(
            slots=inputs[:rows],
            q_starts=inputs[2 * rows : 3 * rows + 1],
            kv_lengths=kv_lengths,
            token_ids=ids,
            positions=positions,
            lines=lines,
            logit_tokens=wanted,
            logit_slots=logit_slots,
            logit_lengths=logit_lengths,
        )

    def _empty(
        self, rows: int, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return token ids, positions, lines and KV lengths to be written, in the kernels' order."""
        device = self._inputs.device
        return (
            torch.empty(tokens, dtype=torch.int64, device=device),
            torch.empty(tokens, dtype=torch.int64, device=device),
            torch.empty(self._groups, tokens, dtype=torch.int64, device=device),
            torch.empty(rows, dtype=torch.int32, device=device),
        )

    def _sizes(self) -> tuple[int, int, int, int]:
        return self._groups, self._max_rows, self._max_blocks, self._block_tokens


class _PinnedBuffers:
    """Pinned memory used in turns: a buffer is written again only after the copy that read it."""

    def __init__(self, size: int) -> None:
        self._buffers = [torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(_BUFFERS)]
        self._arrays: list[Ints] = [buffer.numpy() for buffer in self._buffers]
        self._copied: list[torch.cuda.Event] = []
        self._turn = 0

    def send(self, parts: Sequence[Ints], to: torch.Tensor) -> None:
        """Copy ``parts``, one after another, to the start of ``to``."""
        turn, self._turn = self._turn, (self._turn + 1) % _BUFFERS
        if turn < len(self._copied):
            # Long true where fewer steps are in flight than there are buffers.
            if not self._copied[turn].query():  # type: ignore[no-untyped-call]
                self._copied[turn].synchronize()
        else:
            self._copied.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
        array, size = self._arrays[turn], 0
        for part in parts:
            array[size : size + part.size] = part
            size += part.size
        to[:size].copy_(self._buffers[turn][:size], non_blocking=True)
        self._copied[turn].record()


def _blocks(count: int) -> int:
    return -(-count // _THREADS)
