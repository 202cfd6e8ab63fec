"""What a rank does in the communicator tests, over threads and over processes alike.

All inputs come from (seed, rank, turn), so that a rank knows what every other one sent.
"""

import random
import time
from collections.abc import Sequence

import torch

from worker.comm import Communicator

DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def tensor(seed: int, rank: int, turn: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return what ``rank`` contributes."""
    generator = torch.Generator().manual_seed((seed * 1000 + turn) * 100 + rank)
    if dtype == torch.int64:
        return torch.randint(-(2**40), 2**40, tuple(shape), generator=generator)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def ordered_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum in rank order, half-width floats in float32, rounded once."""
    wide = torch.float32 if parts[0].is_floating_point() else parts[0].dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: {found.shape} for {expected.shape}"
    assert found.dtype == expected.dtype, what
    assert torch.equal(found, expected), what


class Work:
    """Random turns of every operation, the same on every rank but for its pauses."""

    def __init__(self, comm: Communicator, seed: int, turns: int, pause_s: float) -> None:
        self.comm, self.seed, self.turns, self.pause_s = comm, seed, turns, pause_s
        topology = comm.topology
        self.stage, self.place = topology.stage(comm.rank), topology.tp_rank(comm.rank)
        self.group = list(topology.tp_group(self.stage))
        self.rng = random.Random(seed)
        self.own = random.Random(seed * 100 + comm.rank)

    def run(self) -> None:
        """Do all turns; an ``AssertionError`` names what was wrong."""
        for turn in range(self.turns):
            self._pause()
            size = self.rng.choice([0, 1, 3, 576, 5000, 90_001])
            rows, dtype = self.rng.randint(1, 5), self.rng.choice(DTYPES)
            self._collectives(turn, (rows, size), dtype)
            if self.comm.topology.pp > 1:
                self._pipeline(turn, (rows, size), dtype)
            if self.rng.random() < 0.2:
                self.comm.barrier()
        self.comm.barrier()

    def _pause(self) -> None:
        if self.pause_s and self.own.random() < 0.4:
            time.sleep(self.own.random() * self.pause_s)

    def _collectives(self, turn: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        comm, tp = self.comm, self.comm.topology.tp
        parts = [tensor(self.seed, rank, turn, shape, dtype) for rank in self.group]
        x = parts[self.place].clone()
        comm.all_reduce(x)
        same(x, ordered_sum(parts), f"all_reduce {shape} {dtype}")
        x = parts[self.place].repeat(1, 2)[:, ::2]
        comm.all_reduce(x)
        same(x, ordered_sum([part.repeat(1, 2)[:, ::2] for part in parts]), "all_reduce of a strided one")
        same(comm.all_gather(parts[self.place]), torch.stack(parts), "all_gather")
        tall = [part.repeat(tp, 1) for part in parts]
        for index, part in enumerate(tall):
            part[: shape[0]] += index
        share = ordered_sum(tall).view(tp, *shape)[self.place]
        same(comm.reduce_scatter(tall[self.place]), share, "reduce_scatter")
        self._part_of_group(turn, shape, dtype)
        self._pause()
        dealt = [[(turn + sender + taker) % 3 for taker in range(tp)] for sender in range(tp)]
        sent = [
            tensor(self.seed, rank, turn, (sum(counts), shape[1]), dtype)
            for rank, counts in zip(self.group, dealt, strict=True)
        ]
        came = [x.split(counts)[self.place] for x, counts in zip(sent, dealt, strict=True)]
        found = comm.all_to_all(sent[self.place], dealt[self.place])
        same(found, torch.cat(came), "all_to_all")

    def _part_of_group(self, turn: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        comm, topology = self.comm, self.comm.topology
        if comm.dcp is None:
            assert topology.dcp == 1
            return
        parts = [tensor(self.seed, rank, turn, shape, dtype) for rank in topology.dcp_group(comm.rank)]
        mine = topology.dcp_rank(self.place)
        same(comm.dcp.all_gather(parts[mine]), torch.stack(parts), "all_gather of dcp")
        tall = [part.repeat(topology.dcp, 1) for part in parts]
        for index, part in enumerate(tall):
            part[: shape[0]] += index
        share = ordered_sum(tall).view(topology.dcp, *shape)[mine]
        same(comm.dcp.reduce_scatter(tall[mine]), share, "reduce_scatter of dcp")

    def _pipeline(self, turn: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """A step as the runner takes it: tokens come back late, and only when they are needed."""
        comm, topology = self.comm, self.comm.topology
        column = [topology.rank(stage, self.place) for stage in range(topology.pp)]
        if self.stage:
            expected = tensor(self.seed, column[self.stage - 1], turn, shape, dtype)
            same(comm.from_previous_stage(shape, dtype), expected, "from_previous_stage")
        if not topology.is_last(comm.rank):
            comm.to_next_stage(tensor(self.seed, comm.rank, turn, shape, dtype))
        else:
            self._pause()
            comm.tokens_to_first_stage(self._tokens(column[-1], turn))
        if self.stage == 0:
            late = topology.pp
            for past in range(turn - late if turn >= late else turn, turn - late + 1):
                self._take(column[-1], past)
            if turn == self.turns - 1:
                for past in range(max(turn - late + 1, 0), turn + 1):
                    self._take(column[-1], past)

    def _take(self, last: int, turn: int) -> None:
        expected = self._tokens(last, turn)
        same(self.comm.tokens_from_last_stage(len(expected)), expected, "tokens_from_last_stage")

    def _tokens(self, last: int, turn: int) -> torch.Tensor:
        return tensor(self.seed + 1, last, turn, (1 + turn % 4,), torch.int64)
