"""What the device knows of each row's sampling, by slot; changed by one copy and one kernel a step."""

import math
import struct
from dataclasses import dataclass

import numpy as np
import torch

from protocol.control import NewRow
from protocol.sampling import MAX_LOGIT_BIAS, SamplingParams
from worker.backends.cuda.launch import Kernels

MAX_BANNED = 256
"""Banned tokens of one row; the gateway takes 64 stop tokens, and models have a few of their own."""

_IDLE, _FILTERED, _PENALISED = 1, 2, 4
# `Params` of kernels/sampler.cu.
_PARAMS = struct.Struct("<dddQfffiiiiiii8x")
_SPECIAL = struct.Struct("<If")
_BANNED_BIT = 1 << 31
_IN_PROMPT, _MAX_COUNT = 1 << 15, (1 << 15) - 1
_RING = 4
_LEAST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of the vocabulary that a rank has: ids [first, first + width) of ``vocab_size``."""

    vocab_size: int
    first: int
    width: int


def pack_row(slot: int, new: NewRow, part: Slice) -> bytes:
    """Return the record that ``apply_rows`` takes: parameters, biased and banned tokens, token counts.

    Errors: ``ValueError`` for more than ``MAX_BANNED`` banned tokens of this slice.
    """
    params = new.sampling
    assert params.seed is not None, "the gateway draws a missing seed"
    specials = _specials(new, part)
    counts = _counts(new, part) if _is_penalised(params) else None
    flags = _FILTERED if is_filtered(params, part.vocab_size) else 0
    flags |= 0 if counts is None else _PENALISED
    head = _PARAMS.pack(
        params.temperature,
        params.top_p,
        math.log(params.min_p) if params.min_p > 0.0 else -math.inf,
        params.seed,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
        params.top_k if params.top_k < part.vocab_size else 0,
        flags,
        -1 if params.logprobs is None else params.logprobs,
        len(specials) // _SPECIAL.size,
        new.banned_until,
        slot,
        0 if counts is None else len(counts),
    )
    return head + specials + (b"" if counts is None else counts.tobytes())


def is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    """Whether a draw needs the row's whole distribution."""
    if params.temperature == 0.0:
        return False
    return 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0


def _is_penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _specials(new: NewRow, part: Slice) -> bytes:
    biases = new.sampling.logit_bias
    # The row's next draw is at position len(token_ids).
    banned = set(new.banned_token_ids) if len(new.token_ids) < new.banned_until else set()
    if len(banned) >= part.vocab_size:
        banned = set()
    if not biases and not banned:
        return b""
    first, end = part.first, part.first + part.width
    banned = {token for token in banned if first <= token < end}
    if len(banned) > MAX_BANNED:
        raise ValueError(f"{len(banned)} banned tokens in one row; {MAX_BANNED} is the most")
    packed = []
    for token in sorted(banned | {token for token in biases if first <= token < end}):
        mark = _BANNED_BIT if token in banned else 0
        # Adding -0.0 changes no float.
        packed.append(_SPECIAL.pack(token - first | mark, biases.get(token, -0.0)))
    return b"".join(packed)


def _counts(new: NewRow, part: Slice) -> "np.ndarray[tuple[int, int], np.dtype[np.uint32]]":
    """Return uint32 [tokens, 2]: column and count of each token that occurred."""
    columns = np.array(new.token_ids, dtype=np.int64) - part.first
    is_here = (columns >= 0) & (columns < part.width)
    known = new.num_prompt_tokens
    prompt, output = columns[:known][is_here[:known]], columns[known:][is_here[known:]]
    counts = np.bincount(output, minlength=part.width).clip(max=_MAX_COUNT)
    counts[prompt] |= _IN_PROMPT
    (seen,) = counts.nonzero()
    pairs = np.empty((len(seen), 2), dtype=np.uint32)
    pairs[:, 0], pairs[:, 1] = seen, counts[seen]
    return pairs


def _event() -> torch.cuda.Event:
    # Blocking: a wait must not spin a core.
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


class SamplerState:
    """Owner of the rows' state on the device. Used by one thread; launches go to the current stream."""

    def __init__(self, kernels: Kernels, device: torch.device, max_rows: int, part: Slice) -> None:
        self._part = part
        self._apply = kernels.get("sampler", "apply_rows", "PPPiPi")
        rows = max_rows + 1
        self.capacity = min(MAX_LOGIT_BIAS + MAX_BANNED, max(part.width, 1))
        self.count_stride = -(-part.width // 8) * 8
        idle = (1.0, 1.0, -math.inf, 0, 1.0, 0.0, 0.0, 0, _IDLE, -1, 0, 0)
        packed = b"".join(_PARAMS.pack(*idle, slot, 0) for slot in range(rows))
        self.params = torch.frombuffer(bytearray(packed), dtype=torch.int64).to(device)
        self.specials = torch.zeros((rows, self.capacity), dtype=torch.int64, device=device)
        self.counts = torch.zeros((rows, self.count_stride), dtype=torch.int16, device=device)
        record = 1 + (_PARAMS.size // 8) + self.capacity + part.width
        words = max(record, _LEAST_BYTES // 8)
        self._staging = torch.empty(words, dtype=torch.int64, device=device)
        self._ring = [torch.empty(words, dtype=torch.int64, pin_memory=True) for _ in range(_RING)]
        self._copied = [_event() for _ in range(_RING)]
        self._turn = 0
        self._staged: dict[int, bytes] = {}

    @property
    def device_bytes(self) -> int:
        """Memory held on the device."""
        held = (self.params, self.specials, self.counts, self._staging)
        return sum(tensor.nbytes for tensor in held)

    def new_row(self, slot: int, new: NewRow) -> None:
        """Stage a row that begins, or begins again. Errors: those of ``pack_row``."""
        self._staged[slot] = pack_row(slot, new, self._part)

    def release(self, slot: int) -> None:
        """Forget what is staged for a slot; its line on the device is nobody's until the next row's."""
        self._staged.pop(slot, None)

    def upload(self) -> None:
        """Bring what is staged to the device. Waits only where the copy before the last few still runs."""
        while self._staged:
            records: list[bytes] = []
            words = 0
            for slot, record in list(self._staged.items()):
                size = 1 + len(record) // 8
                if words + size > len(self._staging):
                    break
                records.append(record)
                words += size
                del self._staged[slot]
            self._send(records, words)

    def _send(self, records: list[bytes], words: int) -> None:
        buffer, copied = self._ring[self._turn], self._copied[self._turn]
        self._turn = (self._turn + 1) % _RING
        if not copied.query():  # type: ignore[no-untyped-call]
            copied.synchronize()
        offsets, at = [], len(records)
        for record in records:
            offsets.append(at)
            at += len(record) // 8
        packed = struct.pack(f"<{len(offsets)}Q", *offsets) + b"".join(records)
        buffer.numpy()[:words] = np.frombuffer(packed, dtype=np.int64)
        self._staging[:words].copy_(buffer[:words], non_blocking=True)
        copied.record()
        arguments = (
            self._staging,
            self.params,
            self.counts,
            self.count_stride,
            self.specials,
            self.capacity,
        )
        self._apply((len(records),), 1024, arguments)
