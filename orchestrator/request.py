"""A request as engine and scheduler know it: token ids only, one choice each.

A client's request with ``n`` choices is ``n`` of these. The scheduler is the one writer of the state
fields; everything above them is fixed at submission.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

import msgspec

from kv.manager import Holding
from protocol.client import FinishReason
from protocol.control import TokenLogprobs
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
    token_ids: list[int] = field(default_factory=list)
    """Known tokens: the prompt's and the committed ones, the end token included."""
    num_target: int = 0
    """Known tokens and those that steps in flight will sample."""
    num_computed: int = 0
    """Tokens whose KV is in the pool, or will be by the steps in flight."""
    num_committed: int = 0
    """Tokens whose KV committed steps have computed."""
    num_to_sample: int = 0
    """Tokens that may still be planned to be sampled."""
    num_scored: int = 0
    """Prompt positions whose log-probabilities have gone out."""
    num_cached: int = 0
    """Prompt tokens that the first prefix hit gave."""
    queue_key: tuple[float, int] = (0.0, 0)
    """Place in the queue: smaller runs first."""
    slot: int = -1
    holding: Holding | None = None
    """Its blocks, while it has a slot."""
    is_giving_way: bool = False
    """Will be preempted when its steps in flight are committed."""
    admitted_s: float | None = None
    """When it first left the queue."""
    last_step: int = -1
    """The newest step that may write its slot and blocks."""

    @property
    def num_output(self) -> int:
        """Committed tokens."""
        return max(len(self.token_ids) - len(self.prompt_ids), 0)

    @property
    def output_ids(self) -> list[int]:
        """Committed tokens, as a new list."""
        return self.token_ids[len(self.prompt_ids) :]


class RequestOutput(msgspec.Struct, frozen=True, gc=False):
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
