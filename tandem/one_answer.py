"""``tandem run``: one prompt, one answer, on the screen or as data."""

from collections.abc import Callable
from typing import Any

import msgspec

from protocol.chat import ChatMessage
from protocol.client import Info
from protocol.control import TokenLogprobs
from protocol.errors import InvalidRequestError, TandemError
from tandem.client import Client
from tandem.repl import check_can_chat
from tandem.results import Chunk, Parameters, Result


class Prompt(msgspec.Struct, frozen=True):
    """What is asked: text, or token ids."""

    text: str | None
    token_ids: list[int] | None
    raw: bool
    """Text goes to the model as it is, without the chat template."""


def parse_token_ids(text: str) -> list[int]:
    """Return the ids of ``1,2,3``. Errors: ``InvalidRequestError``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequestError(
            f"token ids are numbers with commas between them, not {text[:80]!r}", field="prompt_ids"
        ) from None


def ask(
    client: Client, info: Info, prompt: Prompt, parameters: Parameters, show: Callable[[Chunk], None]
) -> Result:
    """Return the answer; ``show`` gets it piece by piece. Ctrl-C cancels it and is raised.

    Errors: ``InvalidRequestError`` for a prompt that this model cannot take; those of the server.
    """
    if prompt.token_ids is not None:
        stream = client.stream(prompt_ids=prompt.token_ids, **parameters)
    elif prompt.raw and info.has_tokenizer:
        stream = client.stream(prompt.text, **parameters)
    else:
        check_can_chat(info.has_tokenizer, info.has_chat_template, info.model)
        assert prompt.text is not None
        stream = client.stream_chat([ChatMessage("user", prompt.text)], **parameters)
    with stream:
        for chunk in stream:
            show(chunk)
        result = stream.result
    if result is None:
        raise TandemError("the answer ended without a result: the server broke its protocol")
    return result


def as_data(result: Result) -> dict[str, Any]:
    """Return an answer as ``tandem run --json`` prints it. Times are seconds."""
    return {
        "prompt_ids": result.prompt_ids,
        "token_ids": result.token_ids,
        "text": result.text,
        "reasoning": result.reasoning,
        "tool_calls": msgspec.to_builtins(result.tool_calls),
        "finish_reason": result.finish_reason,
        "logprobs": None if result.logprobs is None else [_scores(token) for token in result.logprobs],
        "timings": msgspec.to_builtins(result.timings),
        "usage": msgspec.to_builtins(result.usage),
        "seed": result.seed,
    }


def _scores(token: TokenLogprobs) -> dict[str, Any]:
    return {
        "token_id": token.token_id,
        "logprob": token.logprob,
        "top_ids": token.top_ids,
        "top_logprobs": token.top_logprobs,
    }
