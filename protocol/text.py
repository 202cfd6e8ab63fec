"""What the orchestrator and a text helper process say to each other, over the helper's stdin and stdout.

A frame is its length (4 bytes, little-endian) and then one message of the codec. The helper says
``HelperReady`` once; then each job gets exactly one answer, in order. Structs travel as arrays.
"""

from enum import StrEnum
from typing import Final

import msgspec

from protocol.chat import ChatMessage, Tool, VariableValue
from protocol.framing import Codec

MAX_TEXT_FRAME_BYTES: Final = 64 << 20
LENGTH_BYTES: Final = 4


class EncodeText(msgspec.Struct, frozen=True, array_like=True, tag="encode"):
    """Tokenise ``text``, with the special tokens that the tokenizer adds to a prompt."""

    text: str
    limit: int
    """More tokens than this are counted but not returned."""


class EncodeChat(msgspec.Struct, frozen=True, array_like=True, tag="chat"):
    """Render the chat template up to where the assistant speaks, and tokenise the result."""

    messages: list[ChatMessage]
    limit: int
    tools: list[Tool] = []
    variables: dict[str, VariableValue] = {}


class HelperReady(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The tokenizer is loaded and the limits on memory are set."""

    pid: int


class Encoded(msgspec.Struct, frozen=True, array_like=True, tag="encoded"):
    """The token ids, or only their count where it is over the job's limit."""

    token_ids: list[int]
    count: int
    is_thinking: bool = False
    """A conversation's prompt ends in an open ``<think>``."""


class RefusalKind(StrEnum):
    """Why a helper has no token ids."""

    TEMPLATE = "template"
    """The template is malformed, or raised."""
    MEMORY = "memory"
    """The job's memory ran out; the helper ends after saying so."""
    TOKENIZER = "tokenizer"
    """The tokenizer raised."""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """A job without a result."""

    kind: RefusalKind
    message: str


TextJob = EncodeText | EncodeChat
TextAnswer = HelperReady | Encoded | Refused


def to_helper_codec() -> "Codec[TextJob]":
    """Return a codec for jobs."""
    return Codec(TextJob, MAX_TEXT_FRAME_BYTES)


def from_helper_codec() -> "Codec[TextAnswer]":
    """Return a codec for answers."""
    return Codec(TextAnswer, MAX_TEXT_FRAME_BYTES)
