"""``TextService``: everything that turns words into token ids and back, for one model directory."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from orchestrator.text.detokenizer import Detokenizer, DetokenizerFactory, NoText
from orchestrator.text.pool import HelperPool
from orchestrator.text.speech import Speech
from orchestrator.text.template import TemplateSource, read_json, takes_tools
from orchestrator.text.vocabulary import JsonVocabulary, Vocabulary, load_vocabulary
from protocol.chat import ChatMessage, Tool, VariableValue
from protocol.errors import ContextTooLongError, InvalidRequestError, ModelFormatError
from protocol.text import EncodeChat, Encoded, EncodeText

SHORT_CHARACTERS = 2048
"""Tokenised on the loop: about a millisecond. Longer texts go to a helper."""


class TextService:
    """Owns the tokenizer and the helpers of one instance."""

    def __init__(
        self,
        vocabulary: Vocabulary | None,
        factory: DetokenizerFactory | None,
        pool: HelperPool | None,
        *,
        template: str | None,
        end_token_ids: frozenset[int],
    ) -> None:
        self._vocabulary = vocabulary
        self._factory = factory
        self._pool = pool
        self.has_tokenizer = vocabulary is not None
        self.has_chat_template = template is not None
        self.takes_tools = template is not None and takes_tools(template)
        self.speech = Speech.of(template or "", vocabulary, factory)
        self.end_token_ids = end_token_ids
        """From generation_config.json; config.json's are the ModelSpec's."""

    @classmethod
    async def start(
        cls,
        model_directory: Path,
        *,
        helpers: int = 2,
        prestart: bool = True,
        deadline_s: float = 5.0,
        memory_bytes: int = 512 << 20,
    ) -> Self:
        """Load the tokenizer in a thread; with ``prestart``, one helper starts in the background.

        ``deadline_s`` and ``memory_bytes`` bound one job of a helper.
        Errors: ``ModelFormatError`` for a malformed tokenizer.json, tiktoken.model,
        tokenizer_config.json or generation_config.json.
        """
        vocabulary, factory, source, end_token_ids = await asyncio.to_thread(_load, model_directory)
        if vocabulary is None:
            return cls(None, None, None, template=None, end_token_ids=end_token_ids)
        pool = HelperPool(model_directory, size=helpers, deadline_s=deadline_s, memory_bytes=memory_bytes)
        if prestart and source.text is not None:
            pool.prestart()
        return cls(vocabulary, factory, pool, template=source.text, end_token_ids=end_token_ids)

    def encode_short(self, text: str) -> list[int] | None:
        """Return a raw prompt's tokens (special ones added) at once; None where it is long: use ``encode``.

        Errors: ``InvalidRequestError`` where there is no tokenizer.
        """
        vocabulary = self._checked("prompt")
        if len(text) > SHORT_CHARACTERS:
            return None
        try:
            return vocabulary.encode(text, as_prompt=True)
        except Exception as error:
            # The tokenizer's errors have no class of their own.
            raise InvalidRequestError(
                f"the tokenizer refuses the prompt: {error}", field="prompt"
            ) from None

    async def encode(self, text: str, limit: int) -> list[int]:
        """Return a raw prompt's tokens, tokenised in a helper.

        Errors: ``InvalidRequestError``; ``ContextTooLongError`` over ``limit`` tokens.
        """
        self._checked("prompt")
        assert self._pool is not None
        return _within(await self._pool.run(EncodeText(text, limit)), limit, "prompt")

    async def chat(
        self,
        messages: list[ChatMessage],
        limit: int,
        tools: list[Tool] | None = None,
        variables: dict[str, VariableValue] | None = None,
    ) -> Encoded:
        """Return the tokens of a conversation in the model's template, rendered in a helper.

        Errors: ``InvalidRequestError`` naming ``messages``; ``ContextTooLongError`` over ``limit`` tokens.
        """
        self._checked("messages")
        if not self.has_chat_template:
            raise InvalidRequestError(
                "this model directory has no chat template: send prompt or prompt_ids", field="messages"
            )
        assert self._pool is not None
        job = EncodeChat(messages, limit, tools or [], variables or {})
        encoded = await self._pool.run(job)
        _within(encoded, limit, "messages")
        return encoded

    def detokenizer(self) -> Detokenizer:
        """Return a detokenizer for one choice."""
        return NoText() if self._factory is None else self._factory.make()

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        detokenizer = self.detokenizer()
        return detokenizer.push(token_ids) + detokenizer.finish()

    async def close(self) -> None:
        """End the helpers."""
        if self._pool is not None:
            await self._pool.close()

    def _checked(self, field: str) -> Vocabulary:
        if self._vocabulary is None:
            raise InvalidRequestError(
                f"{field} is text, and this model directory has no tokenizer: send prompt_ids",
                field=field,
            )
        return self._vocabulary


def _load(
    directory: Path,
) -> tuple[Vocabulary | None, DetokenizerFactory | None, TemplateSource, frozenset[int]]:
    end_token_ids = _end_token_ids(read_json(directory / "generation_config.json"))
    source = TemplateSource(directory)
    vocabulary = load_vocabulary(directory)
    if vocabulary is None:
        return None, None, source, end_token_ids
    factory = DetokenizerFactory(
        vocabulary.tokenizer if isinstance(vocabulary, JsonVocabulary) else vocabulary
    )
    return vocabulary, factory, source, end_token_ids


def _end_token_ids(config: dict[str, Any]) -> frozenset[int]:
    found = config.get("eos_token_id")
    token_ids = found if isinstance(found, list) else [] if found is None else [found]
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise ModelFormatError(
                f"generation_config.json: eos_token_id must be token ids, not {found!r}",
                field="generation_config.json",
            )
    return frozenset(token_ids)


def _within(encoded: Encoded, limit: int, field: str) -> list[int]:
    if encoded.count > limit:
        raise ContextTooLongError(
            f"the prompt has {encoded.count} tokens, the context holds {limit}: send a shorter one",
            field=field,
        )
    return encoded.token_ids
