"""A request as engine and scheduler know it: token ids only, one choice each.

A client's request with ``n`` choices is ``n`` of these. The scheduler is the one writer of the state
fields; everything above them is fixed at submission.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from protocol.client import FinishReason
from protocol.control import Advance, TokenLogprobs
from protocol.errors import TandemError
from protocol.sampling import SamplingParams


class RequestState(Enum):
    """Where a request is."""

    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


class End(Enum):
    """How a request ended; the terminal event of its stream says the same."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def finish_reason(self) -> FinishReason | None:
        """Return the wire's word for it; None for cancelled and failed."""
        match self:
            case End.STOP:
                return "stop"
            case End.LENGTH:
                return "length"
            case _:
                return None


@dataclass(slots=True, eq=False)
class Request:
    """One choice of one client request."""

    id: str
    """Unique in the instance."""
    prompt_ids: list[int]
    sampling: SamplingParams
    """With a seed."""
    max_tokens: int
    """Already bounded by the context."""
    min_tokens: int
    stop_token_ids: frozenset[int]
    """End tokens among them, unless they are to be ignored."""
    priority: int
    arrival_s: float
    deadline_s: float | None
    """Monotonic seconds."""
    cache_salt: str
    sink: "Sink"

    # --- state, written by the scheduler ---
    state: RequestState = RequestState.WAITING
    output_ids: list[int] = field(default_factory=list)
    """Committed tokens, the end token included."""
    num_computed: int = 0
    """Known tokens whose KV is, or will be by the steps in flight, in the pool."""
    num_in_flight: int = 0
    """Tokens that steps in flight will sample: planned for, not yet known."""
    num_cached: int = 0
    """Prompt tokens that the first prefix hit gave."""
    slot: int = -1
    admitted_s: float | None = None
    """When it first left the queue."""
    last_step: int = -1
    """The newest step in flight that may write its slot and blocks."""
    advance: Advance | None = None
    """The steady decode's advance, made once."""

    @property
    def num_known(self) -> int:
        """Prompt and committed tokens."""
        return len(self.prompt_ids) + len(self.output_ids)


@dataclass(slots=True, frozen=True)
class RequestOutput:
    """What one commit brought for one request. The last one of a request has ``end`` set, exactly once."""

    request: Request
    token_ids: Sequence[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: tuple[int, list[TokenLogprobs]] | None = None
    """First position, and the scores from there."""
    end: End | None = None
    error: TandemError | None = None
    """Set where ``end`` is FAILED."""


class Sink(Protocol):
    """Who gets a request's outputs (the gateway; HTTP later). Must not block and must not raise."""

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Take all outputs of one commit that belong to this sink's requests, in order."""
