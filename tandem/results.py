"""What a client gets: chunks while an answer is made, and the whole result."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import msgspec

from protocol.chat import ChatMessage, FunctionCall, Tool, ToolCall, ToolCallDelta, ToolChoice
from protocol.client import (
    Delta,
    Finished,
    FinishReason,
    PromptScores,
    Started,
    Timings,
    Usage,
)
from protocol.control import TokenLogprobs
from protocol.errors import InvalidRequestError

Messages = Sequence[ChatMessage | Mapping[str, Any]]
_SAMPLING = frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "logit_bias", "seed", "logprobs", "prompt_logprobs"),
    )
)


class Parameters(TypedDict, total=False):
    """What a request may say beside its prompt; ``protocol.client.Generate`` says what it means."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    n: int
    max_tokens: int | None
    min_tokens: int
    stop: list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    priority: int
    timeout_s: float | None
    cache_salt: str
    tools: Sequence[Tool | Mapping[str, Any]]
    tool_choice: ToolChoice | Mapping[str, Any]
    thinking: bool | None
    chat_template_kwargs: Mapping[str, Any]
    parse: bool


class Chunk(msgspec.Struct, frozen=True):
    """More of one choice. ``token_ids`` may run ahead of ``text``, which comes in whole characters."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    """Set on the choice's last chunk."""
    reasoning: str = ""
    """What the model thinks before it speaks."""
    tool_calls: list[ToolCallDelta] = []


class Choice(msgspec.Struct, frozen=True):
    """One whole answer."""

    index: int
    text: str
    token_ids: list[int]
    """With the end token, where the model ended by one."""
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason
    reasoning: str = ""
    tool_calls: list[ToolCall] = []
    """They can be sent back as they are, in a message of the assistant's."""


class Result(msgspec.Struct, frozen=True):
    """A finished request. ``text``, ``token_ids``, ``logprobs``, ``finish_reason``: the first choice's."""

    choices: list[Choice]
    prompt_ids: list[int]
    prompt_logprobs: list[TokenLogprobs] | None
    """From the prompt's second token on; the first has none."""
    seed: int
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """Return the answer."""
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        """Return what the model thought before it spoke."""
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Return the calls that the answer makes."""
        return self.choices[0].tool_calls

    @property
    def token_ids(self) -> list[int]:
        """Return the answer's tokens."""
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """Return the log-probabilities of the answer's tokens."""
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        """Return why the answer ended."""
        return self.choices[0].finish_reason


class Collector:
    """Adds up the events of one stream. Owned by the stream."""

    def __init__(self) -> None:
        self.started: Started | None = None
        self._scores: list[TokenLogprobs] | None = None
        self._deltas: dict[int, list[Delta]] = {}
        self._finished: Finished | None = None

    def take(self, event: Started | Delta | PromptScores | Finished) -> Chunk | None:
        """Keep an event; return the chunk that it is, if it is one."""
        match event:
            case Delta():
                self._deltas.setdefault(event.index, []).append(event)
                return Chunk(
                    event.index,
                    event.text,
                    event.token_ids,
                    event.logprobs,
                    event.finish_reason,
                    event.reasoning,
                    event.tool_calls or [],
                )
            case Started():
                self.started = event
            case PromptScores():
                self._scores = (self._scores or []) + event.logprobs
            case Finished():
                self._finished = event
        return None

    def result(self) -> Result | None:
        """Return the result, or None while there is none yet."""
        if self._finished is None or self.started is None:
            return None
        return Result(
            choices=[_choice(index, self._deltas[index]) for index in sorted(self._deltas)],
            prompt_ids=self.started.prompt_ids,
            prompt_logprobs=self._scores,
            seed=self.started.seed,
            usage=self._finished.usage,
            timings=self._finished.timings,
        )


def _choice(index: int, deltas: list[Delta]) -> Choice:
    reason = deltas[-1].finish_reason
    assert reason is not None, "a finished request has a finish reason for each choice"
    scored = [d.logprobs for d in deltas if d.logprobs is not None]
    return Choice(
        index=index,
        text="".join(d.text for d in deltas),
        token_ids=[t for d in deltas for t in d.token_ids],
        logprobs=[s for scores in scored for s in scores] if scored else None,
        finish_reason=reason,
        reasoning="".join(d.reasoning for d in deltas),
        tool_calls=_calls([call for d in deltas for call in d.tool_calls or ()]),
    )


def _calls(deltas: list[ToolCallDelta]) -> list[ToolCall]:
    """Return whole calls, in the order of their beginnings."""
    ids: dict[int, tuple[str, str]] = {}
    arguments: dict[int, str] = {}
    for delta in deltas:
        if delta.id is not None and delta.name is not None:
            ids[delta.index] = delta.id, delta.name
        arguments[delta.index] = arguments.get(delta.index, "") + delta.arguments
    return [ToolCall(call, FunctionCall(name, arguments[at])) for at, (call, name) in ids.items()]


def generate_message(
    prompt: str | None,
    prompt_ids: Sequence[int] | None,
    messages: Messages | None,
    parameters: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a ``Generate`` as plain data: what is wrong with it, the server says, in one place.

    Errors: ``InvalidRequestError`` for what is not even data.
    """
    found: dict[str, Any] = {"type": "generate", "sampling": {}}
    if prompt is not None:
        found["prompt"] = prompt
    if prompt_ids is not None:
        try:
            found["prompt_ids"] = [int(t) for t in prompt_ids]
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"prompt_ids must be token ids: {error}", field="prompt_ids"
            ) from None
    if messages is not None:
        found["messages"] = list(messages)
    for name, value in parameters.items():
        (found["sampling"] if name in _SAMPLING else found)[name] = value
    return found
