"""What a client and the gateway say to each other. Structs travel as maps; unknown fields are errors."""

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocol.chat import ChatMessage, Tool, ToolCallDelta, ToolChoice, Variable, VariableValue
from protocol.control import TokenLogprobs
from protocol.errors import ErrorInfo
from protocol.framing import MAX_CLIENT_FRAME_BYTES, Codec
from protocol.sampling import SamplingParams
from protocol.topology import Topology

KEEP_ALIVE_S = 2.0
"""A client with an open stream says something at least this often."""
SILENCE_LIMIT_S = 6.0
"""After this much silence the gateway cancels a connection's streams."""

StreamId = Annotated[str, Meta(min_length=1, max_length=64)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
FinishReason = Literal["stop", "length", "tool_calls"]
_TEMPLATES_OWN = ("messages", "tools", "documents", "add_generation_prompt")


class Generate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="generate"):
    """Ask for an answer. Exactly one of ``prompt``, ``prompt_ids`` and ``messages`` is given."""

    id: StreamId
    """Chosen by the client, unique among its open streams."""
    prompt: str | None = None
    prompt_ids: list[TokenId] | None = None
    messages: list[ChatMessage] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] = []
    """What the model may call; with ``messages`` only."""
    tool_choice: ToolChoice = "auto"
    """``none`` keeps the tools from the model. ``required`` and a named tool are refused."""
    thinking: bool | None = None
    """``thinking`` and ``enable_thinking`` of the chat template; None: as the template has it."""
    chat_template_kwargs: Annotated[dict[Variable, VariableValue], Meta(max_length=16)] = {}
    """Other variables of the chat template."""
    parse: bool = True
    """Tell reasoning and tool calls apart from text; else all that the model says is text."""
    sampling: SamplingParams = SamplingParams()
    n: Annotated[int, Meta(ge=1, le=64)] = 1
    """Answers; choice i draws from a seed derived from the request's and i."""
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """None: as many as the context holds."""
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """End and stop tokens are not sampled before this many."""
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=16)] = []
    """Strings that end the answer; not part of its text."""
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] = []
    ignore_eos: bool = False
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    """Higher runs first; waiting requests age towards the front."""
    timeout_s: Annotated[float, Meta(gt=0.0, le=86400.0)] | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] = ""
    """Prefixes are shared only among requests of the same salt."""

    def __post_init__(self) -> None:
        given = [x for x in ("prompt", "prompt_ids", "messages") if getattr(self, x) is not None]
        if len(given) != 1:
            raise ValueError(
                f"prompt: give exactly one of prompt, prompt_ids and messages, not {given or 'none'}"
            )
        if self.messages is None and (self.tools or self.thinking is not None or self.chat_template_kwargs):
            raise ValueError("messages are missing: tools and the template's variables are for them alone")
        for name in self.chat_template_kwargs:
            if name in _TEMPLATES_OWN or name.endswith("_token"):
                raise ValueError(f"chat_template_kwargs: {name} is not for a request to set")
        if self.timeout_s is not None and not math.isfinite(self.timeout_s):
            raise ValueError("timeout_s must be a finite number of seconds")


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cancel"):
    """End a stream. Its terminal event is still sent; an unknown id is ignored (it may just have ended)."""

    id: StreamId


class KeepAlive(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="keep_alive"):
    """A client is still there."""


class GetStats(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="get_stats"):
    """Ask for ``Stats``."""

    id: StreamId


class GetInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="get_info"):
    """Ask for ``Info``."""

    id: StreamId


class Started(msgspec.Struct, frozen=True, tag="started"):
    """A request was admitted."""

    id: str
    prompt_ids: list[int]
    seed: int


class Delta(msgspec.Struct, frozen=True, omit_defaults=True, tag="delta"):
    """More of one choice. ``token_ids`` include an end token; no text of it includes a stop string."""

    id: str
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    """Set on a choice's last delta."""
    reasoning: str = ""
    """What the model thinks before it speaks; no part of ``text``."""
    tool_calls: list[ToolCallDelta] | None = None


class PromptScores(msgspec.Struct, frozen=True, tag="prompt_scores"):
    """Log-probabilities of the prompt's tokens from position ``start``; position 0 has none."""

    id: str
    start: int
    logprobs: list[TokenLogprobs]


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a request over all its choices."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Timings(msgspec.Struct, frozen=True):
    """Seconds, from the gateway's receipt of the request."""

    queue_s: float
    first_token_s: float
    total_s: float


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """Terminal: every choice has its finish reason."""

    id: str
    usage: Usage
    timings: Timings


class Cancelled(msgspec.Struct, frozen=True, tag="cancelled"):
    """Terminal: the client asked for it."""

    id: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Terminal: an error. ``id`` is None where the bytes did not even name a stream."""

    id: str | None
    error: ErrorInfo


class ExpertBalance(msgspec.Struct, frozen=True):
    """How evenly the tokens of one layer choose its experts."""

    layer: int
    tokens: int
    """Choices, ``top_k`` of each token, since the ranks' start; some seconds old."""
    imbalance: float
    """Of the expert with most, over the mean: 1 is even."""
    busiest: int
    """The expert with most."""


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """A running instance in numbers, since its boot where not said otherwise."""

    id: str
    uptime_s: float
    waiting: int
    running: int
    finished: int
    cancelled: int
    failed: int
    preemptions: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    connections: int
    step_ms: float
    """Moving average."""
    experts: list[ExpertBalance] = []
    """By layer; empty for a model without experts, and before the first report."""


class MemoryRow(msgspec.Struct, frozen=True):
    """One line of the memory plan of the tightest rank."""

    name: str
    predicted_bytes: int
    measured_bytes: int | None
    because: str


class Info(msgspec.Struct, frozen=True, tag="info"):
    """What is served, and how."""

    id: str
    instance: str
    model: str
    architecture: str
    state: str
    tp: int
    pp: int
    dtype: str
    context: int
    vocab_size: int
    kv_tokens: int
    max_rows: int
    has_tokenizer: bool
    has_chat_template: bool
    memory: list[MemoryRow]
    ep: int = 1
    dcp: int = 1
    kv_dtype: str = ""
    """What keys and values are stored in."""

    @property
    def layout(self) -> Topology:
        """How the ranks are arranged."""
        return Topology(self.tp, self.pp, self.ep, self.dcp)


ClientMessage = Generate | Cancel | KeepAlive | GetStats | GetInfo
Event = Started | Delta | PromptScores | Finished | Cancelled | Failed | Stats | Info


class Events(msgspec.Struct, frozen=True, array_like=True):
    """One frame to a client: all that a step brought for its streams."""

    events: list[Event]


def to_gateway_codec() -> "Codec[ClientMessage]":
    """Return a codec for messages from clients."""
    return Codec(ClientMessage, MAX_CLIENT_FRAME_BYTES)


def from_gateway_codec() -> "Codec[Events]":
    """Return a codec for messages to clients."""
    return Codec(Events, MAX_CLIENT_FRAME_BYTES)
