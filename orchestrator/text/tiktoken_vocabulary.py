"""Kimi's vocabulary: ranks of byte pairs in ``tiktoken.model``, named tokens in tokenizer_config.json.

Format: a line a token, its bytes in base64, a space, its rank (OpenAI's tiktoken); after the ranks come
256 named ids. The checkpoint's own loader is Python code, which is never run: its split pattern and the
lengths at which it cuts long texts are data here. Source: moonshotai's tokenization_kimi.py.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import tiktoken

from protocol.errors import ModelFormatError

VOCABULARY_FILE: Final = "tiktoken.model"
MAX_VOCABULARY_BYTES: Final = 64 << 20
NUM_NAMED: Final = 256
MAX_CHUNK: Final = 400_000
"""Characters; tiktoken's splitter fails on much longer ones."""
MAX_RUN: Final = 25_000
"""Characters without a change between space and no space: a run is one piece for the merges, whose time
grows faster than its length."""

_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LEAD: Final = r"[^\r\n\p{L}\p{N}]?"
_ENDING: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN: Final = "|".join(
    (
        r"[\p{Han}]+",
        f"{_LEAD}{_UPPER}*{_LOWER}+{_ENDING}",
        f"{_LEAD}{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class TiktokenVocabulary:
    """A vocabulary of ranks. Named tokens are recognised wherever they stand in a text."""

    def __init__(
        self, ranks: dict[bytes, int], named: dict[str, int], special_ids: frozenset[int], bos: str | None
    ) -> None:
        self._encoding = tiktoken.Encoding(
            "checkpoint", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=named
        )
        self._named = named
        self._name_of = {token_id: name for name, token_id in named.items()}
        self._piece_of = {rank: piece for piece, rank in ranks.items()}
        self._bos_ids = [named[bos]] if bos in named else []
        self._names = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))))
        self.special_ids = special_ids

    @classmethod
    def load(cls, directory: Path, config: dict[str, Any]) -> "TiktokenVocabulary":
        """Read a model directory's ``tiktoken.model``; ``config`` is its tokenizer_config.json.

        Errors: ``ModelFormatError`` for a line, rank or named token that cannot be.
        """
        ranks = _read_ranks(directory / VOCABULARY_FILE)
        named, special_ids = _named_tokens(config, len(ranks))
        bos = config.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        wants_bos = config.get("add_bos_token") is True
        return cls(ranks, named, special_ids, bos if wants_bos and isinstance(bos, str) else None)

    @property
    def added_tokens(self) -> list[str]:
        """Names that stand for one token wherever they occur."""
        return list(self._named)

    @property
    def special_tokens(self) -> list[str]:
        """Those of them that are no text."""
        return [name for name, token_id in self._named.items() if token_id in self.special_ids]

    def token_id(self, name: str) -> int | None:
        """Return the id of an added token."""
        return self._named.get(name)

    def encode(self, text: str, *, as_prompt: bool) -> list[int]:
        """Return token ids; ``as_prompt`` puts the begin token before them, where the model wants one."""
        token_ids = list(self._bos_ids) if as_prompt else []
        start = 0
        for match in self._names.finditer(text):
            self._encode_plain(text[start : match.start()], token_ids)
            token_ids.append(self._named[match[0]])
            start = match.end()
        self._encode_plain(text[start:], token_ids)
        return token_ids

    def _encode_plain(self, text: str, token_ids: list[int]) -> None:
        for start in range(0, len(text), MAX_CHUNK):
            for piece in split_runs(text[start : start + MAX_CHUNK], MAX_RUN):
                token_ids += self._encoding.encode_ordinary(piece)

    def piece(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for: none for special and unknown ids."""
        piece = self._piece_of.get(token_id)
        if piece is not None:
            return piece
        if token_id in self.special_ids:
            return b""
        return self._name_of.get(token_id, "").encode()

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return b"".join(map(self.piece, token_ids)).decode("utf-8", "replace")


def split_runs(text: str, longest: int) -> Iterator[str]:
    """Cut a text where a run of spaces, or of anything else, gets longer than ``longest`` characters."""
    start = run = 0
    was_space = False
    for index, character in enumerate(text):
        is_space = character.isspace()
        if is_space is not was_space:
            run, was_space = 0, is_space
        elif run == longest:
            yield text[start:index]
            start, run = index, 0
        run += 1
    if start < len(text):
        yield text[start:]


def _read_ranks(path: Path) -> dict[bytes, int]:
    size = path.stat().st_size
    if size > MAX_VOCABULARY_BYTES:
        raise _malformed(f"{path} has {size} bytes, more than {MAX_VOCABULARY_BYTES}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise _malformed(f"{path}, line {number}: not a token in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _malformed(f"{path}: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _malformed(f"{path}: no token for byte {missing[0]:#04x}, so some text has no tokens")
    return ranks


def _named_tokens(config: dict[str, Any], first: int) -> tuple[dict[str, int], frozenset[int]]:
    """Return the 256 names after the ranks, and the ids of those that have no text."""
    found = config.get("added_tokens_decoder", {})
    if not isinstance(found, dict):
        raise _malformed("tokenizer_config.json: added_tokens_decoder is not an object")
    names = {token_id: f"<|reserved_token_{token_id}|>" for token_id in range(first, first + NUM_NAMED)}
    special_ids = set(names)
    for key, token in found.items():
        name = token.get("content") if isinstance(token, dict) else None
        if not key.isascii() or not key.isdecimal() or int(key) not in names or not name:
            raise _malformed(
                f"tokenizer_config.json: added_tokens_decoder names token {key!r} {name!r}; those are "
                f"{first} to {first + NUM_NAMED - 1}"
            )
        if not isinstance(name, str):
            raise _malformed(f"tokenizer_config.json: the content of token {key} is no text")
        names[int(key)] = name
        if token.get("special") is False:
            special_ids.discard(int(key))
    named = {name: token_id for token_id, name in names.items()}
    if len(named) != NUM_NAMED:
        raise _malformed("tokenizer_config.json: added_tokens_decoder gives two tokens one name")
    return named, frozenset(special_ids)


def _malformed(message: str) -> ModelFormatError:
    return ModelFormatError(message, field=VOCABULARY_FILE)
