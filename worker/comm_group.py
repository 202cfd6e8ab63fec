"""Collectives of one tensor-parallel group, written once over a meeting of its ranks."""

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Protocol

import torch

from protocol.errors import COLLECTIVE_CODE, TandemError


class CollectiveError(TandemError):
    """A rank waited for others in vain. The communicator is of no more use; ``close`` it.

    ``peers`` are the ranks that were waited for, or the one that is known to be the cause.
    """

    code = COLLECTIVE_CODE

    def __init__(self, rank: int, operation: str, peers: Sequence[int], reason: str) -> None:
        names = ", ".join(map(str, peers))
        super().__init__(f"rank {rank}, {operation} with rank {names}: {reason}")
        self.rank, self.operation, self.peers = rank, operation, tuple(peers)


class Operation(IntEnum):
    """What the ranks of a group meet for; all of them must have come for the same."""

    ALL_REDUCE = 1
    ALL_GATHER = 2
    REDUCE_SCATTER = 3
    ALL_TO_ALL = 4
    BARRIER = 5

    @property
    def label(self) -> str:
        """Return its name as the interface spells it."""
        return self.name.lower()


class Meeting(Protocol):
    """Where each rank of a group lays down a piece and sees those of all."""

    @property
    def limit_bytes(self) -> int:
        """Return the largest piece, a multiple of 64."""

    def meet(self, operation: Operation, piece: torch.Tensor) -> Sequence[torch.Tensor] | torch.Tensor:
        """Return the pieces of all ranks in rank order, valid until the next meeting.

        ``piece`` is flat, contiguous, and of the same size and dtype on every rank.
        Errors: ``CollectiveError``.
        """

    def close(self) -> None:
        """Leave; peers that wait for this rank get their error."""


def sum_in_rank_order(parts: Sequence[torch.Tensor] | torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of ``parts`` into ``out``: the same operations on every rank, so the same bits.

    Half-width floats are added in float32 and rounded once.
    """
    if out.dtype in (torch.bfloat16, torch.float16):
        total = parts[0].float()
        for index in range(1, len(parts)):
            total.add_(parts[index])
        out.copy_(total)
        return
    torch.add(parts[0], parts[1], out=out)
    for index in range(2, len(parts)):
        out.add_(parts[index])


class TensorGroup:
    """The collectives of one rank in its group. Owns the meeting; more than one rank."""

    def __init__(self, meeting: Meeting, index: int, size: int) -> None:
        """``index``: this rank's place in the group of ``size``."""
        assert size > 1
        self._meeting, self._index, self._size = meeting, index, size

    def all_reduce(self, x: torch.Tensor) -> None:
        """See ``Communicator.all_reduce``."""
        flat = x.reshape(-1)
        for start, end in self._pieces(flat.numel(), x.element_size()):
            piece = flat[start:end]
            sum_in_rank_order(self._meeting.meet(Operation.ALL_REDUCE, piece), piece)
        if flat.data_ptr() != x.data_ptr():
            x.copy_(flat.view(x.shape))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Communicator.all_gather``."""
        flat = x.reshape(-1)
        out = x.new_empty((self._size, flat.numel()))
        for start, end in self._pieces(flat.numel(), x.element_size()):
            parts = self._meeting.meet(Operation.ALL_GATHER, flat[start:end])
            for index in range(self._size):
                out[index, start:end] = parts[index]
        return out.view(self._size, *x.shape)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Communicator.reduce_scatter``."""
        if x.shape[0] % self._size:
            raise ValueError(f"{x.shape[0]} rows cannot be dealt evenly to {self._size} ranks")
        # Pieces are columns of [size, share], so that every piece has something for every rank.
        shares = x.reshape(self._size, -1)
        out = x.new_empty(shares.shape[1])
        for start, end in self._pieces(shares.shape[1], x.element_size() * self._size):
            piece = shares[:, start:end].reshape(-1)
            parts = self._meeting.meet(Operation.REDUCE_SCATTER, piece)
            mine = slice(self._index * (end - start), (self._index + 1) * (end - start))
            sum_in_rank_order([parts[index][mine] for index in range(self._size)], out[start:end])
        return out.view(x.shape[0] // self._size, *x.shape[1:])

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """See ``Communicator.all_to_all``."""
        if len(counts) != self._size or sum(counts) != x.shape[0] or min(counts) < 0:
            raise ValueError(f"counts {list(counts)} do not deal {x.shape[0]} rows to {self._size} ranks")
        meet = self._meeting.meet
        told = meet(Operation.ALL_TO_ALL, torch.tensor(counts, dtype=torch.int64))
        table = [told[index].tolist() for index in range(self._size)]
        width = math.prod(x.shape[1:])
        # All lay down as much as the one with most, so that they agree on the number of pieces.
        flat = x.new_zeros(max(map(sum, table)) * width)
        flat[: x.numel()] = x.reshape(-1)
        firsts = [sum(row[: self._index]) * width for row in table]
        sizes = [row[self._index] * width for row in table]
        out = x.new_empty((sum(row[self._index] for row in table), *x.shape[1:]))
        received = torch.split_with_sizes(out.view(-1), sizes)
        for start, end in self._pieces(flat.numel(), x.element_size()):
            parts = meet(Operation.ALL_TO_ALL, flat[start:end])
            for index, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
                low, high = max(start, first), min(end, first + size)
                if low < high:
                    received[index][low - first : high - first] = parts[index][low - start : high - start]
        return out

    def barrier(self) -> None:
        """Return when every rank of the group is here."""
        self._meeting.meet(Operation.BARRIER, torch.zeros(1))

    def close(self) -> None:
        """See ``Communicator.close``."""
        self._meeting.close()

    def _pieces(self, count: int, item_bytes: int) -> Iterator[tuple[int, int]]:
        step = max(self._meeting.limit_bytes // item_bytes, 1)
        for start in range(0, count, step):
            yield start, min(start + step, count)
