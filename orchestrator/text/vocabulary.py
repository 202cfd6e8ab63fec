"""One interface for the vocabularies that checkpoints come with, and the finding of a directory's own."""

from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from orchestrator.text.template import read_json
from orchestrator.text.tiktoken_vocabulary import VOCABULARY_FILE, TiktokenVocabulary
from protocol.errors import ModelFormatError

MAX_TOKENIZER_BYTES = 512 << 20


class Vocabulary(Protocol):
    """Text to token ids. The way back is ``DetokenizerFactory``'s."""

    @property
    def added_tokens(self) -> list[str]:
        """Names that stand for one token wherever they occur."""

    @property
    def special_tokens(self) -> list[str]:
        """Those of them that are no text."""

    def token_id(self, name: str) -> int | None:
        """Return the id of an added token."""

    def encode(self, text: str, *, as_prompt: bool) -> list[int]:
        """Return token ids; ``as_prompt`` adds the special tokens that a raw prompt gets."""


class JsonVocabulary:
    """A ``tokenizer.json``, through huggingface/tokenizers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def added_tokens(self) -> list[str]:
        """Names that stand for one token wherever they occur."""
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]

    @property
    def special_tokens(self) -> list[str]:
        """Those of them that are no text."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def token_id(self, name: str) -> int | None:
        """Return the id of an added token."""
        found: int | None = self.tokenizer.token_to_id(name)
        return found

    def encode(self, text: str, *, as_prompt: bool) -> list[int]:
        """Return token ids; ``as_prompt`` adds the special tokens that a raw prompt gets."""
        token_ids: list[int] = self.tokenizer.encode(text, add_special_tokens=as_prompt).ids
        return token_ids


def load_vocabulary(directory: Path) -> JsonVocabulary | TiktokenVocabulary | None:
    """Return a model directory's vocabulary: tokenizer.json, else tiktoken.model, else None.

    Errors: ``ModelFormatError`` for one that is too large or malformed.
    """
    path = directory / "tokenizer.json"
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        if not (directory / VOCABULARY_FILE).exists():
            return None
        return TiktokenVocabulary.load(directory, read_json(directory / "tokenizer_config.json"))
    if size > MAX_TOKENIZER_BYTES:
        raise ModelFormatError(f"{path} has {size} bytes, more than {MAX_TOKENIZER_BYTES}", field=path.name)
    try:
        return JsonVocabulary(Tokenizer.from_file(str(path)))
    except Exception as error:
        # The tokenizer's errors have no class of their own.
        raise ModelFormatError(f"{path} is no tokenizer: {error}", field=path.name) from None
