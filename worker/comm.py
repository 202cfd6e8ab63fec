"""What ranks say to each other in tensors: one interface, over processes or over threads."""

from collections.abc import Sequence
from typing import Protocol

import torch

from protocol.topology import Topology
from worker.comm_gloo import GlooCommunicator
from worker.comm_group import CollectiveError
from worker.comm_threads import ThreadCommunicator, thread_group

__all__ = [
    "CollectiveError",
    "Collectives",
    "Communicator",
    "GlooCommunicator",
    "ThreadCommunicator",
    "thread_group",
]


class Collectives(Protocol):
    """The collectives of one rank among some others, more than one rank in all; ``n`` of them below.

    As those of ``Communicator``, with these ranks in the place of the tp group.
    """

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, *x.shape], in rank order."""

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of the sum over the ranks of ``x``, whose first dimension n divides."""


class Communicator(Protocol):
    """One rank's ways to the others. Used by one thread.

    Every rank of a group calls the same collectives in the same order with the same shapes. Every wait
    has the deadline given at its making and ends in a ``CollectiveError`` that names the rank, the
    operation and the peers; after one, only ``close`` may be called. With a degree of 1 the operations of
    that degree cost nothing.
    """

    rank: int
    topology: Topology
    deals_in_steps: bool
    """Whether ``all_to_all`` is for use inside a step: where it waits on the host, it is not."""

    @property
    def dcp(self) -> Collectives | None:
        """Return the ways to the ranks that keep the other positions of the same KV; None for dcp 1."""

    def all_reduce(self, x: torch.Tensor) -> None:
        """Replace ``x`` by its sum over the tp group, added in rank order: the same bits on all ranks."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return [tp, *x.shape], in rank order; for tp 1 a view of ``x``."""

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's share, [n / tp, ...], of the sum over the group of ``x`` [n, ...].

        Errors: ``ValueError`` where tp does not divide n.
        """

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Send the first ``counts[0]`` rows of ``x`` to tp rank 0, and so on; return what came, by sender.

        Errors: ``ValueError`` where the counts do not deal out the rows.
        """

    def to_next_stage(self, x: torch.Tensor) -> None:
        """Give ``x`` to the same tp rank of the next stage; nobody may write to it any more.

        Waits only where the next stage has not yet taken the one before the last.
        """

    def from_previous_stage(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Wait for what the same tp rank of the previous stage gives."""

    def tokens_to_first_stage(self, t: torch.Tensor) -> None:
        """Give int64 [count] tokens from the last stage to the same tp rank of the first; does not block.

        More than pp + 2 that the first stage has not taken are more steps than are ever in flight: then
        it waits.
        """

    def tokens_from_last_stage(self, count: int) -> torch.Tensor:
        """Wait, on the first stage, for the next int64 [count] tokens of the last."""

    def barrier(self) -> None:
        """Return when every rank of the instance is here."""

    def close(self) -> None:
        """Let go of the connections; peers that still wait get their error. May be called twice."""
