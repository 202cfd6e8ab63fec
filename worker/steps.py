"""What the control loop asks of a runner, whatever the device. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.control import StepPlan, StepResult
from worker.expert_load import CountedLayer

Answer = Callable[[StepResult | Exception], None]
"""Takes the sampling rank's result, or on any rank what went wrong behind the caller's back; may be
called from another thread, in the order of the steps."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Coefficients of a step's predicted time."""

    fixed_s: float
    per_token_s: float


class StepRunner(Protocol):
    """One rank's executor of plans."""

    def step(self, plan: StepPlan, answer: Answer) -> None:
        """Run a plan, or have it run: a device may still be at it when this returns.

        ``answer`` is called with the result where this rank samples. What goes wrong is raised here, or
        answered where a device found it later.
        """

    def expert_loads(self) -> Sequence[CountedLayer]:
        """Return the counters of this rank's layers with experts."""

    def close(self) -> None:
        """Let go of the device after what it is at."""
