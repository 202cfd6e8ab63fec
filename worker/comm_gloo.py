"""Ranks as processes of one machine: gloo between stages, a shared-memory window within a group."""

import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    FileStore,
    PrefixStore,
    ProcessGroupGloo,
    Work,
)

from protocol.topology import Topology
from worker.comm_group import CollectiveError, TensorGroup
from worker.comm_window import open_window

LOOPBACK = "127.0.0.1"

_HIDDEN_IN_FLIGHT = 1
"""Sends of hidden states kept back: a stage runs at most one step ahead of what the next has taken."""
_TAG = 0

T = TypeVar("T")


class _Line:
    """Point-to-point traffic of one kind in a gloo group of its own. Owns the sends in flight."""

    def __init__(self, rank: int, ranks: Sequence[int], group: Any, timeout_s: float) -> None:
        """``group``: a ``ProcessGroupGloo``, of whose methods torch's stubs know nothing."""
        self._rank, self._ranks, self._group = rank, ranks, group
        self._timeout_s = timeout_s
        # The tensor stays alive beside its handle: gloo reads it until the handle is done.
        self._sends: deque[tuple[Work, torch.Tensor, int]] = deque()

    def send(self, operation: str, x: torch.Tensor, peer: int, most_in_flight: int) -> None:
        while len(self._sends) > most_in_flight:
            self._reap(operation)
        x = x.contiguous()
        place = self._ranks.index(peer)
        work = self._guard(operation, peer, lambda: self._group.send([x], place, _TAG))
        self._sends.append((work, x, peer))

    def receive(self, operation: str, out: torch.Tensor, peer: int) -> torch.Tensor:
        place = self._ranks.index(peer)
        self._guard(operation, peer, lambda: self._group.recv([out], place, _TAG).wait())
        return out

    def barrier(self) -> None:
        others = [rank for rank in self._ranks if rank != self._rank]
        _guarded(self._rank, "barrier", others, self._timeout_s, lambda: self._group.barrier().wait())

    def close(self) -> None:
        self._group.abort()
        self._sends.clear()

    def _reap(self, operation: str) -> None:
        work, _, peer = self._sends.popleft()
        self._guard(operation, peer, work.wait)

    def _guard(self, operation: str, peer: int, call: Callable[[], T]) -> T:
        return _guarded(self._rank, operation, [peer], self._timeout_s, call)


def _guarded(rank: int, operation: str, peers: Sequence[int], timeout_s: float, call: Callable[[], T]) -> T:
    try:
        return call()
    except RuntimeError as error:
        # Gloo puts its source file before the reason, and advice after it.
        reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
        raise CollectiveError(rank, operation, peers, f"{reason} (deadline {timeout_s:g} s)") from None


class GlooCommunicator:
    """``Communicator`` of a worker process. Owns its groups, its window and their sockets.

    Within a tensor-parallel group every rank adds the same parts in rank order, so all get the same
    bits, which are also those of ``ThreadCommunicator``. Hidden states and tokens go through gloo groups
    of their own, so that they cannot be taken for each other or wait for each other.
    """

    deals_in_steps = True

    def __init__(
        self,
        rank: int,
        topology: Topology,
        group: TensorGroup | None,
        dcp: TensorGroup | None,
        lines: tuple[_Line, _Line, _Line] | None,
        store: FileStore | None,
    ) -> None:
        """``lines``: of hidden states, tokens and barriers; None without a pipeline. Use ``connect``."""
        self.rank, self.topology, self.dcp = rank, topology, dcp
        self._group, self._lines, self._store = group, lines, store
        stage, place = topology.stage(rank), topology.tp_rank(rank)
        self._next = None if topology.is_last(rank) else topology.rank(stage + 1, place)
        self._previous = None if topology.is_first(rank) else topology.rank(stage - 1, place)
        self._first, self._last = topology.rank(0, place), topology.rank(topology.pp - 1, place)
        self._tokens_in_flight = topology.pp + 2

    @classmethod
    def connect(
        cls, topology: Topology, rank: int, rendezvous_file: str | os.PathLike[str], timeout_s: float
    ) -> "GlooCommunicator":
        """Meet the other ranks through ``rendezvous_file``, new for this epoch, in a private directory.

        ``timeout_s`` bounds the meeting and every later wait. Listens on 127.0.0.1 alone, and not at
        all without a pipeline. Errors: ``CollectiveError``.
        """
        if topology.world_size == 1:
            return cls(rank, topology, None, None, None, None)
        path = Path(rendezvous_file)
        everybody = [r for r in range(topology.world_size) if r != rank]
        store = _guarded(
            rank, "connect", everybody, timeout_s, lambda: FileStore(str(path), topology.world_size)
        )
        store.set_timeout(timedelta(seconds=timeout_s))
        ranks = topology.tp_group(topology.stage(rank))
        group = _window_group("tp", path, store, rank, ranks, timeout_s)
        dcp = group
        if topology.dcp < topology.tp:
            dcp = _window_group("dcp", path, store, rank, topology.dcp_group(rank), timeout_s)
        lines = _connect_lines(store, topology, rank, timeout_s) if topology.pp > 1 else None
        return cls(rank, topology, group, dcp, lines, store)

    def all_reduce(self, x: torch.Tensor) -> None:
        """See ``Communicator.all_reduce``."""
        if self._group is not None:
            self._group.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Communicator.all_gather``."""
        return x.unsqueeze(0) if self._group is None else self._group.all_gather(x)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Communicator.reduce_scatter``."""
        return x if self._group is None else self._group.reduce_scatter(x)

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """See ``Communicator.all_to_all``."""
        return x if self._group is None else self._group.all_to_all(x, counts)

    def to_next_stage(self, x: torch.Tensor) -> None:
        """See ``Communicator.to_next_stage``."""
        assert self._lines is not None
        assert self._next is not None, "the last stage has no next one"
        self._lines[0].send("to_next_stage", x, self._next, _HIDDEN_IN_FLIGHT)

    def from_previous_stage(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See ``Communicator.from_previous_stage``."""
        assert self._lines is not None
        assert self._previous is not None, "the first stage has none before it"
        return self._lines[0].receive(
            "from_previous_stage", torch.empty(tuple(shape), dtype=dtype), self._previous
        )

    def tokens_to_first_stage(self, t: torch.Tensor) -> None:
        """See ``Communicator.tokens_to_first_stage``."""
        assert self._lines is not None
        assert self.rank == self._last != self._first, "only the last of several stages sends tokens"
        self._lines[1].send("tokens_to_first_stage", t, self._first, self._tokens_in_flight)

    def tokens_from_last_stage(self, count: int) -> torch.Tensor:
        """See ``Communicator.tokens_from_last_stage``."""
        assert self._lines is not None
        assert self.rank == self._first != self._last, "only the first of several stages takes tokens"
        return self._lines[1].receive(
            "tokens_from_last_stage", torch.empty(count, dtype=torch.int64), self._last
        )

    def barrier(self) -> None:
        """See ``Communicator.barrier``."""
        if self._lines is not None:
            self._lines[2].barrier()
        elif self._group is not None:
            self._group.barrier()

    def close(self) -> None:
        """See ``Communicator.close``."""
        for group in (self._group, self.dcp):
            if group is not None:
                group.close()
        for line in self._lines or ():
            line.close()


def _window_group(
    name: str, path: Path, store: FileStore, rank: int, ranks: Sequence[int], timeout_s: float
) -> TensorGroup | None:
    """Return the collectives of some ranks over a window of their own; None for one rank alone."""
    if len(ranks) == 1:
        return None
    window = open_window(name, path, store, rank, ranks, timeout_s)
    return TensorGroup(window, ranks.index(rank), len(ranks))


def _connect_lines(
    store: FileStore, topology: Topology, rank: int, timeout_s: float
) -> tuple[_Line, _Line, _Line]:
    place = topology.tp_rank(rank)
    column = [topology.rank(stage, place) for stage in range(topology.pp)]
    world = list(range(topology.world_size))
    device = ProcessGroupGloo.create_device(hostname=LOOPBACK)

    def line(name: str, ranks: list[int]) -> _Line:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
        options._devices = [device]  # noqa: SLF001
        options._timeout = timedelta(seconds=timeout_s)  # noqa: SLF001
        options._threads = 1  # noqa: SLF001
        group = _guarded(
            rank,
            "connect",
            [r for r in ranks if r != rank],
            timeout_s,
            lambda: ProcessGroupGloo(PrefixStore(name, store), ranks.index(rank), len(ranks), options),
        )
        return _Line(rank, ranks, group, timeout_s)

    return line(f"hidden/{place}", column), line(f"tokens/{place}", column), line("world", world)
