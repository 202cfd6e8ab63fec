"""What a client sent, decoded and held against the model's limits before anything is done with it."""

import hashlib
import struct

import msgspec

from orchestrator.text.service import TextService
from protocol.chat import VariableValue
from protocol.client import ClientMessage, Generate, Info, to_gateway_codec
from protocol.errors import ContextTooLongError, InvalidRequestError, ProtocolError, TandemError
from protocol.framing import VERSION


class _OnlyId(msgspec.Struct):
    id: str | None = None


class Intake:
    """Decodes and checks; keeps nothing of what it saw."""

    def __init__(self, info: Info) -> None:
        self._info = info
        self._codec = to_gateway_codec()
        self._only_id = msgspec.msgpack.Decoder(_OnlyId)

    def decode(self, frame: memoryview | bytes) -> ClientMessage:
        """Return a message.

        Errors: ``ProtocolError`` and ``InvalidRequestError``, naming the field where one is at fault.
        """
        try:
            return self._codec.decode(frame)
        except ProtocolError as error:
            field = _field_that_is_not_utf8(frame)
            if field is None:
                raise
            raise InvalidRequestError(f"{field} is not UTF-8 text: {error.message}", field=field) from None

    def recover_id(self, frame: memoryview | bytes) -> str | None:
        """Return the stream id of a frame that does not decode, where it can still be made out."""
        if not 2 <= len(frame) <= self._codec.max_bytes or frame[0] != VERSION:
            return None
        try:
            found = self._only_id.decode(memoryview(frame)[1:]).id
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError):
            return None
        return found if found is not None and 1 <= len(found) <= 64 else None

    def check(self, generate: Generate) -> None:
        """Refuse what this model cannot do, whatever the prompt's length turns out to be."""
        info, sampling = self._info, generate.sampling
        for name in ("prompt", "prompt_ids", "messages"):
            given = getattr(generate, name)
            if given is not None and not len(given):
                raise InvalidRequestError(f"{name} is empty: give at least one token of it", field=name)
        if generate.stop and not info.has_tokenizer:
            raise InvalidRequestError(
                "stop is text, and this model directory has no tokenizer: send stop_token_ids",
                field="stop",
            )
        if generate.prompt_ids is not None:
            self.check_prompt(generate.prompt_ids, "prompt_ids")
        self._check_vocabulary(generate.stop_token_ids, "stop_token_ids")
        self._check_vocabulary(list(sampling.logit_bias), "sampling.logit_bias")
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(sampling, name)
            if wanted is not None and wanted > info.vocab_size:
                raise InvalidRequestError(
                    f"{name} {wanted} asks for more than the vocabulary of {info.vocab_size}",
                    field=f"sampling.{name}",
                )
        if generate.max_tokens is not None and generate.min_tokens > generate.max_tokens:
            raise InvalidRequestError(
                f"min_tokens {generate.min_tokens} is more than max_tokens {generate.max_tokens}",
                field="min_tokens",
            )

    def check_prompt(self, token_ids: list[int], field: str) -> None:
        """Refuse a prompt that is empty, outside the vocabulary, or leaves no room for an answer."""
        if not token_ids:
            raise InvalidRequestError(f"{field} gives no token at all: send more", field=field)
        if len(token_ids) >= self._info.context:
            raise ContextTooLongError(
                f"the prompt has {len(token_ids)} tokens, the context holds {self._info.context}, at least "
                "one of them of the answer: send a shorter one",
                field=field,
            )
        self._check_vocabulary(token_ids, field)

    def _check_vocabulary(self, token_ids: list[int], field: str) -> None:
        size = self._info.vocab_size
        if token_ids and max(token_ids) >= size:
            bad = next(t for t in token_ids if t >= size)
            raise InvalidRequestError(
                f"token id {bad} in {field} is outside the vocabulary of {size} (ids 0 to {size - 1})",
                field=field,
            )


def check_tools(generate: Generate, text: TextService) -> None:
    """Refuse tools that this model could not be told of, or whose calls could not be read."""
    choice = generate.tool_choice
    if choice not in ("none", "auto"):
        raise InvalidRequestError(
            "a call cannot be forced yet: tool_choice is auto or none", field="tool_choice"
        )
    if not generate.tools or choice == "none":
        return
    if text.has_chat_template and not text.takes_tools:
        raise InvalidRequestError(
            "this model's chat template has no place for tools: ask without them", field="tools"
        )
    if generate.parse and text.speech.tools is None:
        raise InvalidRequestError(
            "this model's calls are in no form known here: with parse false they come as text",
            field="tools",
        )


def template_variables(generate: Generate) -> dict[str, VariableValue]:
    """Return what a request sets of its chat template's variables."""
    if generate.thinking is None:
        return generate.chat_template_kwargs
    # The published templates have one name or the other.
    thinking = {"thinking": generate.thinking, "enable_thinking": generate.thinking}
    return thinking | generate.chat_template_kwargs


def choice_seed(seed: int, index: int) -> int:
    """Return the seed of one of ``n`` choices, 0 to 2**63 - 1; the first keeps the request's."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def as_tandem_error(error: Exception) -> TandemError:
    """Return an error as one that may cross the wire."""
    return error if isinstance(error, TandemError) else TandemError(f"{type(error).__name__}: {error}")


def _field_that_is_not_utf8(frame: memoryview | bytes) -> str | None:
    """Return the name of the first field whose text is not UTF-8, in a frame that is otherwise a map."""
    fields = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
    try:
        found = fields.decode(memoryview(frame)[1:])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError):
        return None
    for name, raw in found.items():
        try:
            msgspec.msgpack.decode(raw)
        except UnicodeDecodeError:
            return name
        except (msgspec.DecodeError, RecursionError, OverflowError, TypeError):
            continue
    return None
