"""Draws tokens on the device: the meaning of a draw is ``worker.sampler``'s, and so are the noise bits.

A row is one cluster of eight blocks. Rows without a filter cost one pass over their logits. Rows with one
are held in shared memory, where the filter's threshold is found by histograms: a coarse one of the values,
then the float's bits, eight at a time. Sums of probability are in fixed point, so the order of adding does
not matter. Over a tensor-parallel group, unfiltered rows cost a gather of three numbers each; a call that
is ``full`` also gathers the adjusted logits, and every rank draws all rows.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from protocol.control import NewRow, TokenLogprobs
from protocol.sampling import MAX_LOGPROBS
from worker.backends.cuda.launch import Kernels
from worker.backends.cuda.sampler_state import SamplerState, Slice, is_filtered
from worker.comm import Communicator
from worker.sampler import NonFiniteLogitsError, Sampled

SCORES = 2 + 2 * MAX_LOGPROBS
"""A row of scores: the token's log-probability, log-sum-exp, the highest log-probabilities, their ids."""

_SPREAD, _THREADS = 8, 512
_STATIC_SHARED, _DEFAULT_SHARED, _MOST_SHARED = 14 << 10, 48 << 10, 213 << 10


@dataclass(frozen=True, slots=True)
class SamplerOutputs:
    """Where one call writes, on the device or copied to the host."""

    token_ids: torch.Tensor
    """int32 [rows]."""
    broken: torch.Tensor
    """int32 [rows]: not 0 where logits hold NaN or +inf, or nothing above -inf."""
    scores: torch.Tensor
    """float64 [rows, SCORES]; written by full calls for the rows that ask for log-probabilities."""

    @classmethod
    def empty(cls, rows: int, device: torch.device, pin_memory: bool = False) -> "SamplerOutputs":
        """Return room for ``rows`` rows; pinned: on the host, to copy to."""
        return cls(
            torch.empty(rows, dtype=torch.int32, device=device, pin_memory=pin_memory),
            torch.empty(rows, dtype=torch.int32, device=device, pin_memory=pin_memory),
            torch.empty((rows, SCORES), dtype=torch.float64, device=device, pin_memory=pin_memory),
        )


class CudaSampler:
    """Sampler of one rank of the last stage. Owns the rows' sampling state, by slot. Used by one thread."""

    def __init__(
        self,
        kernels: Kernels,
        comm: Communicator,
        device: torch.device,
        vocab_size: int,
        max_rows: int,
        last_tokens: torch.Tensor,
    ) -> None:
        """``last_tokens``: int64 [max_rows + 1], each slot's newest token, written by every draw.

        Errors: ``ValueError`` for a vocabulary that does not fit a cluster's shared memory.
        """
        assert last_tokens.dtype == torch.int64
        assert len(last_tokens) == max_rows + 1
        topology = comm.topology
        self._comm, self._tp = comm, topology.tp
        self._room = -(-vocab_size // self._tp)
        first = min(topology.tp_rank(comm.rank) * self._room, vocab_size)
        self._part = Slice(vocab_size, first, min(first + self._room, vocab_size) - first)
        self._last_tokens, self._device = last_tokens, device
        self._filter_shared, self._score_shared = _shared_bytes(vocab_size), _shared_bytes(self._part.width)
        # The sum of a whole vocabulary stays below 2**63.
        self._weight_bits = 63 - vocab_size.bit_length()
        self.state = SamplerState(kernels, device, max_rows, self._part)
        self._asked: list[int | None] = [None] * (max_rows + 1)
        self._is_filtered = [False] * (max_rows + 1)
        self._draw = kernels.get("sampler", "draw", "PqPPiPiPPiiPPPP")
        self._merge_draws = kernels.get("sampler", "merge_draws", "PiiPPiPiiPPP")
        self._adjust_rows = kernels.get("sampler", "adjust_rows", "PqPPiPiPPiiP")
        self._draw_filtered = kernels.get("sampler", "draw_filtered", "PqqiiiPPiPiPPiiPPP")
        self._score = kernels.get("sampler", "score", "PqPPiPiiP")
        self._merge_scores = kernels.get("sampler", "merge_scores", "PiiPPiP")

    @property
    def width(self) -> int:
        """Entries of this rank's part of the vocabulary."""
        return self._part.width

    def new_row(self, slot: int, new: NewRow) -> None:
        """Stage a row that begins, or begins again with its answer so far. Errors: ``ValueError``."""
        self.state.new_row(slot, new)
        self._asked[slot] = new.sampling.logprobs
        self._is_filtered[slot] = is_filtered(new.sampling, self._part.vocab_size)

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self.state.release(slot)
        self._asked[slot], self._is_filtered[slot] = None, False

    def upload(self) -> None:
        """Bring staged rows to the device, on the current stream; before the step's ``sample``."""
        self.state.upload()

    def is_full(self, slots: Iterable[int]) -> bool:
        """Whether a call with these slots must be ``full``."""
        return any(self._is_filtered[slot] or self._asked[slot] is not None for slot in slots)

    def asked(self, slots: Iterable[int]) -> list[int | None]:
        """Return how many log-probabilities each row asks for: what ``read`` is to be given later."""
        return [self._asked[slot] for slot in slots]

    def sample(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        out: SamplerOutputs,
        full: bool,
    ) -> None:
        """Draw the token at ``positions[i]`` (how many tokens row i knows) for each row. Capturable.

        ``logits``: float32 [rows, room or more], this rank's ids from tp_rank × room on, where room is
        ceil(vocab / tp); columns past the vocabulary are ignored. Not changed. ``slots``, ``positions``:
        int32 [rows]; no slot twice but the scratch slot, whose rows get token 0. ``full``: see ``is_full``;
        a call that is not leaves rows with filters and log-probabilities undone. All ranks of the group
        call alike and get the same tokens. Errors: ``CollectiveError``.
        """
        rows = len(logits)
        if rows == 0:
            return
        self._check(logits, slots, positions, out)
        state, part = self.state, self._part
        params, counts = state.params, state.counts
        of_rows = (params, counts, state.count_stride, state.specials, state.capacity, slots, positions)
        outputs = (out.token_ids, out.broken, self._last_tokens)
        partials = None
        if self._tp > 1:
            partials = torch.empty((rows, 3), dtype=torch.float64, device=self._device)
        arguments = (logits, logits.stride(0), *of_rows, part.first, part.width)
        self._draw((_SPREAD, rows), _THREADS, (*arguments, 0 if partials is None else partials, *outputs))
        if partials is not None:
            parts = self._comm.all_gather(partials)
            state_of = (params, counts, state.count_stride, slots)
            merged = (parts, self._tp, rows, *state_of, part.first, part.width, *outputs)
            self._merge_draws((-(-rows // 128),), 128, merged)
        if not full:
            return
        whole, layout = logits, (logits.stride(0), 0, 0)
        if self._tp > 1:
            mine = torch.empty((rows, self._room), dtype=torch.float32, device=self._device)
            self._adjust_rows(
                (32, rows), 256, (logits, logits.stride(0), *of_rows, part.width, self._room, mine)
            )
            whole, layout = self._comm.all_gather(mine), (self._room, rows * self._room, self._room)
        self._draw_filtered(
            (_SPREAD, rows),
            _THREADS,
            (
                whole,
                *layout,
                part.vocab_size,
                self._weight_bits,
                *of_rows,
                part.first,
                part.width,
                *outputs,
            ),
            self._filter_shared,
        )
        self._write_scores(logits, slots, -1, out.token_ids, out.scores)

    def score(self, logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> torch.Tensor:
        """Return scores, float64 [rows, SCORES]: those of ``token_ids[i]`` (int32) and of the k highest.

        ``logits``: as for ``sample``. For ``read_scores``, once they are on the host.
        """
        assert 0 <= k <= MAX_LOGPROBS
        assert token_ids.dtype == torch.int32
        assert len(token_ids) == len(logits)
        out = torch.empty((len(logits), SCORES), dtype=torch.float64, device=self._device)
        if len(logits):
            self._write_scores(logits, None, k, token_ids, out)
        return out

    def read(self, out: SamplerOutputs, asked: Sequence[int | None]) -> Sampled:
        """Return a call's tokens from outputs on the host; ``asked``: of its rows, without padded ones.

        Errors: ``NonFiniteLogitsError`` naming the rows.
        """
        rows = len(asked)
        broken = [row for row, is_broken in enumerate(out.broken[:rows].tolist()) if is_broken]
        if broken:
            raise NonFiniteLogitsError(broken)
        token_ids: list[int] = out.token_ids[:rows].tolist()
        logprobs: list[TokenLogprobs | None] = [None] * rows
        for row, count in enumerate(asked):
            if count is not None:
                logprobs[row] = self._read_row(token_ids[row], out.scores[row].tolist(), count)
        return Sampled(token_ids, logprobs)

    def read_scores(self, scores: torch.Tensor, token_ids: list[int], k: int) -> list[TokenLogprobs]:
        """Return what ``score`` found, from its result on the host. Errors: ``NonFiniteLogitsError``."""
        found = scores[: len(token_ids)].tolist()
        broken = [row for row, values in enumerate(found) if not math.isfinite(values[1])]
        if broken:
            raise NonFiniteLogitsError(broken)
        return [self._read_row(token, values, k) for token, values in zip(token_ids, found, strict=True)]

    def _read_row(self, token: int, values: list[float], count: int) -> TokenLogprobs:
        count = min(count, self._part.vocab_size)
        ids = values[2 + MAX_LOGPROBS : 2 + MAX_LOGPROBS + count]
        return TokenLogprobs(token, values[0], [int(i) for i in ids], values[2 : 2 + count])

    def _write_scores(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor | None,
        asked: int,
        token_ids: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        rows, part = len(logits), self._part
        asks = (self.state.params, 0 if slots is None else slots, asked)
        mine = torch.empty((rows, SCORES), dtype=torch.float64, device=self._device)
        arguments = (logits, logits.stride(0), *asks, token_ids, part.first, part.width, mine)
        self._score((_SPREAD, rows), _THREADS, arguments, self._score_shared)
        parts = self._comm.all_gather(mine)
        self._merge_scores((rows,), 128, (parts, self._tp, rows, *asks, out))

    def _check(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, out: SamplerOutputs
    ) -> None:
        rows = len(logits)
        assert logits.dtype == torch.float32
        assert logits.stride(1) == 1
        assert logits.shape[1] >= self._part.width, f"{tuple(logits.shape)} for {self._part}"
        assert slots.dtype == positions.dtype == out.token_ids.dtype == out.broken.dtype == torch.int32
        assert out.scores.dtype == torch.float64
        assert len(slots) == len(positions) == rows, (len(slots), len(positions), rows)
        assert min(len(out.token_ids), len(out.broken), len(out.scores)) >= rows


def _shared_bytes(width: int) -> int:
    """Return the dynamic shared memory of a block that holds its part of ``width`` float32 logits."""
    needed = -(-width // (4 * _SPREAD)) * 16
    if needed > _MOST_SHARED:
        raise ValueError(
            f"a vocabulary of {width} does not fit the sampler's shared memory: "
            f"{_MOST_SHARED // 16 * 4 * _SPREAD} is the most"
        )
    # Between the two, static and dynamic together pass what a kernel may have unasked.
    if needed + _STATIC_SHARED > _DEFAULT_SHARED:
        return max(needed, _DEFAULT_SHARED + 16)
    return max(needed, 16)
