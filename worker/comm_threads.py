"""Ranks as threads of one process, over memory: for tests and for trying a layout without processes."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from protocol.topology import Topology
from worker.comm_group import CollectiveError, Operation, TensorGroup


class _Switch:
    """Owner of the one lock's conditions, so that an abort wakes every waiter."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.aborted_by: int | None = None
        self._conditions: list[threading.Condition] = []

    def condition(self) -> threading.Condition:
        """Return a new condition on the lock."""
        made = threading.Condition(self.lock)
        self._conditions.append(made)
        return made

    def abort(self, rank: int) -> None:
        """End every wait, now and later."""
        with self.lock:
            if self.aborted_by is None:
                self.aborted_by = rank
            for condition in self._conditions:
                condition.notify_all()


@dataclass(eq=False)
class _Round:
    """One meeting of a group: what each member laid down, and how many have left."""

    pieces: dict[int, torch.Tensor] = field(default_factory=dict)
    asked: dict[int, tuple[Operation, int]] = field(default_factory=dict)
    left: int = 0


class _Hall:
    """Where one group meets. A member may be a whole round ahead of another, never two."""

    def __init__(self, switch: _Switch, ranks: Sequence[int]) -> None:
        self.ranks, self.switch = list(ranks), switch
        self.changed = switch.condition()
        self.rounds: dict[int, _Round] = {}


class _Seat:
    """``Meeting`` of one member of a hall."""

    limit_bytes = 1 << 40

    def __init__(self, hall: _Hall, rank: int, timeout_s: float) -> None:
        self._hall, self._rank, self._timeout_s = hall, rank, timeout_s
        self._sequence = 0

    def meet(self, operation: Operation, piece: torch.Tensor) -> list[torch.Tensor]:
        """See ``Meeting.meet``."""
        hall, self._sequence = self._hall, self._sequence + 1
        # Others read it while its owner may already write on.
        copied = piece.clone()
        with hall.changed:
            meeting = hall.rounds.setdefault(self._sequence, _Round())
            meeting.pieces[self._rank] = copied
            meeting.asked[self._rank] = (operation, piece.nbytes)
            if len(meeting.pieces) == len(hall.ranks):
                hall.changed.notify_all()
            absent = [rank for rank in hall.ranks if rank not in meeting.pieces]
            _wait(
                hall.switch,
                hall.changed,
                lambda: len(meeting.pieces) == len(hall.ranks),
                self._timeout_s,
                (self._rank, operation.label, absent),
            )
            meeting.left += 1
            if meeting.left == len(hall.ranks):
                del hall.rounds[self._sequence]
        for rank, asked in meeting.asked.items():
            if asked != (operation, piece.nbytes):
                reason = (
                    f"it came for {asked[0].label} with {asked[1]} bytes, not {piece.nbytes}: the ranks "
                    "run different plans"
                )
                raise CollectiveError(self._rank, operation.label, [rank], reason)
        return [meeting.pieces[rank] for rank in hall.ranks]

    def close(self) -> None:
        """See ``Meeting.close``; a thread that ends in error says so by ``abort``."""


class _Channel:
    """A directed queue of tensors between two ranks."""

    def __init__(self, switch: _Switch) -> None:
        self.switch, self.changed = switch, switch.condition()
        self.waiting: deque[torch.Tensor] = deque()

    def put(self, x: torch.Tensor) -> None:
        """Never blocks: plans in flight bound what can wait here."""
        with self.changed:
            self.waiting.append(x.clone())
            self.changed.notify_all()

    def take(self, timeout_s: float, who: tuple[int, str, Sequence[int]]) -> torch.Tensor:
        """Wait for the next tensor."""
        with self.changed:
            _wait(self.switch, self.changed, lambda: bool(self.waiting), timeout_s, who)
            return self.waiting.popleft()


def _wait(
    switch: _Switch,
    changed: threading.Condition,
    is_done: Callable[[], bool],
    timeout_s: float,
    who: tuple[int, str, Sequence[int]],
) -> None:
    came = changed.wait_for(lambda: is_done() or switch.aborted_by is not None, timeout_s)
    rank, operation, peers = who
    if is_done():
        return
    if switch.aborted_by is not None:
        raise CollectiveError(rank, operation, [switch.aborted_by], "it has ended: its own error says why")
    assert not came
    raise CollectiveError(rank, operation, peers, f"nothing came within the deadline of {timeout_s:g} s")


class ThreadCommunicator:
    """``Communicator`` of one thread. Made by ``thread_group``; the halls and channels are shared."""

    deals_in_steps = True

    def __init__(
        self,
        rank: int,
        topology: Topology,
        group: TensorGroup | None,
        dcp: TensorGroup | None,
        world: TensorGroup | None,
        channels: dict[tuple[str, int, int], _Channel],
        switch: _Switch,
        timeout_s: float,
    ) -> None:
        self.rank, self.topology, self.dcp = rank, topology, dcp
        self._group, self._world, self._channels = group, world, channels
        self._switch, self._timeout_s = switch, timeout_s

    def abort(self) -> None:
        """Release the other ranks with an error; a thread calls it when it ends in one."""
        self._switch.abort(self.rank)

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
        assert not self.topology.is_last(self.rank), "the last stage has no next one"
        self._channels["hidden", self.rank, self.rank + self.topology.tp].put(x)

    def from_previous_stage(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See ``Communicator.from_previous_stage``."""
        assert not self.topology.is_first(self.rank), "the first stage has none before it"
        peer = self.rank - self.topology.tp
        who = (self.rank, "from_previous_stage", [peer])
        found = self._channels["hidden", peer, self.rank].take(self._timeout_s, who)
        if tuple(found.shape) != tuple(shape) or found.dtype != dtype:
            reason = f"it sent {tuple(found.shape)} {found.dtype}, expected {tuple(shape)} {dtype}"
            raise CollectiveError(*who, reason)
        return found

    def tokens_to_first_stage(self, t: torch.Tensor) -> None:
        """See ``Communicator.tokens_to_first_stage``."""
        assert self.topology.is_last(self.rank), "only the last stage sends tokens"
        self._channels["tokens", self.rank, self.topology.tp_rank(self.rank)].put(t)

    def tokens_from_last_stage(self, count: int) -> torch.Tensor:
        """See ``Communicator.tokens_from_last_stage``."""
        assert self.topology.is_first(self.rank), "only the first stage takes tokens"
        peer = self.topology.rank(self.topology.pp - 1, self.rank)
        who = (self.rank, "tokens_from_last_stage", [peer])
        found = self._channels["tokens", peer, self.rank].take(self._timeout_s, who)
        if tuple(found.shape) != (count,):
            raise CollectiveError(*who, f"it sent {tuple(found.shape)} tokens, expected {count}")
        return found

    def barrier(self) -> None:
        """See ``Communicator.barrier``."""
        if self._world is not None:
            self._world.barrier()

    def close(self) -> None:
        """See ``Communicator.close``."""


def thread_group(topology: Topology, timeout_s: float = 60.0) -> list[ThreadCommunicator]:
    """Return the communicators of all ranks, in rank order, each for a thread of its own."""
    switch = _Switch()
    everybody = range(topology.world_size)
    world = _Hall(switch, everybody)
    halls = [_Hall(switch, topology.tp_group(stage)) for stage in range(topology.pp)]
    parts = {ranks: _Hall(switch, ranks) for ranks in map(topology.dcp_group, everybody)}
    channels: dict[tuple[str, int, int], _Channel] = {}
    for rank in everybody:
        if not topology.is_last(rank):
            channels["hidden", rank, rank + topology.tp] = _Channel(switch)
        elif topology.pp > 1:
            channels["tokens", rank, topology.tp_rank(rank)] = _Channel(switch)

    def seat(hall: _Hall, rank: int) -> TensorGroup | None:
        size = len(hall.ranks)
        if size == 1:
            return None
        return TensorGroup(_Seat(hall, rank, timeout_s), hall.ranks.index(rank), size)

    def communicator(rank: int) -> ThreadCommunicator:
        group = seat(halls[topology.stage(rank)], rank)
        dcp = group if topology.dcp == topology.tp else seat(parts[topology.dcp_group(rank)], rank)
        return ThreadCommunicator(
            rank, topology, group, dcp, seat(world, rank), channels, switch, timeout_s
        )

    return [communicator(rank) for rank in everybody]
