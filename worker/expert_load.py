"""How many tokens chose each expert of this rank, told to the orchestrator now and then. No torch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.control import ExpertLoad, LayerLoad
from protocol.topology import Topology

INTERVAL_S = 5.0
"""Between two reports of a rank whose steps go on."""


@dataclass(frozen=True, slots=True)
class CountedLayer:
    """One layer's local experts."""

    layer: int
    first: int
    """Id of the first local expert."""
    read: Callable[[], list[int]]
    """Returns their counts so far; may wait for the device."""


class LoadReports:
    """Says when a rank's counts are to be told. Used by the control loop alone.

    Where experts are cut, all ranks of a group count the same: the first one tells it.
    """

    def __init__(
        self,
        layers: Sequence[CountedLayer],
        topology: Topology,
        rank: int,
        epoch: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """What was counted before, by the warm-up, is left out."""
        tells = topology.ep > 1 or topology.tp_rank(rank) == 0
        self._layers = tuple(layers) if tells else ()
        self._rank, self._epoch, self._clock = rank, epoch, clock
        self._warmup = [layer.read() for layer in self._layers]
        self._due_s: float | None = None

    def stepped(self) -> None:
        """Note that a step has run."""
        if self._layers and self._due_s is None:
            self._due_s = self._clock() + INTERVAL_S

    def wait_s(self) -> float | None:
        """Return the seconds until the next report; None: none is due."""
        return None if self._due_s is None else max(self._due_s - self._clock(), 0.001)

    def take(self) -> ExpertLoad | None:
        """Return the report that is due now, once."""
        if self._due_s is None or self._clock() < self._due_s:
            return None
        self._due_s = None
        return ExpertLoad(
            self._epoch,
            self._rank,
            [
                LayerLoad(one.layer, one.first, [n - m for n, m in zip(one.read(), before, strict=True)])
                for one, before in zip(self._layers, self._warmup, strict=True)
            ],
        )
