"""Token ids to text, a few at a time: what is given out adds up to ``Tokenizer.decode`` of all ids.

Byte-level BPE and byte-fallback tokenizers decode token by token from a table; every other decoder
goes through the tokenizer's own stream. Sources: the decoders of huggingface/tokenizers (ByteLevel,
ByteFallback, Fuse, Strip) and OpenAI's byte alphabet for GPT-2.
"""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from orchestrator.text.tiktoken_vocabulary import TiktokenVocabulary

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """The text of one choice. Special tokens and unknown ids have none."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete; an incomplete character is withheld."""

    def finish(self) -> str:
        """Return what was withheld, incomplete characters as U+FFFD."""


class NoText:
    """The detokenizer of a model directory without a tokenizer: token ids only."""

    def push(self, token_ids: Sequence[int]) -> str:  # noqa: ARG002
        """Return no text."""
        return ""

    def finish(self) -> str:
        """Return no text."""
        return ""


class TokenTable(dict[int, str | None]):
    """Token id -> its text where that is independent of its neighbours, else None. Fills as tokens come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special = {
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }

    def __missing__(self, token_id: int) -> str | None:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        self[token_id] = text = "" if token is None else self.text_of(token_id, token)
        return text

    def text_of(self, token_id: int, token: str) -> str | None:
        """Return the text of a token that is neither special nor unknown."""
        raise NotImplementedError


class ByteLevelTable(TokenTable):
    """Tokens spelt in the byte alphabet; those that are no whole characters are in ``pieces``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.pieces: dict[int, bytes] = {}
        self._alphabet = _byte_alphabet()

    def text_of(self, token_id: int, token: str) -> str | None:
        """Return the text, or None where the token's bytes begin or end inside a character."""
        try:
            piece = bytes([self._alphabet[c] for c in token])
        except KeyError:
            return token  # An added token, outside the alphabet: it stands for itself.
        try:
            return piece.decode()
        except UnicodeDecodeError:
            self.pieces[token_id] = piece
            return None


class TiktokenTable(dict[int, str | None]):
    """Token id -> its text, None where its bytes are no whole characters: those are in ``pieces``."""

    def __init__(self, vocabulary: TiktokenVocabulary) -> None:
        super().__init__()
        self.pieces: dict[int, bytes] = {}
        self._vocabulary = vocabulary

    def __missing__(self, token_id: int) -> str | None:
        piece = self._vocabulary.piece(token_id)
        text: str | None
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            self.pieces[token_id] = piece
            text = None
        self[token_id] = text
        return text


class ByteLevelDetokenizer:
    """Byte-level BPE: the bytes of all tokens together are UTF-8."""

    def __init__(self, table: "ByteLevelTable | TiktokenTable", marks: Mapping[int, str]) -> None:
        self._table, self._marks = table, marks
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        if not self._pending:
            if len(token_ids) == 1:
                text = self._table[token_ids[0]]
                if text is not None:
                    return text
            else:
                texts = [self._table[t] for t in token_ids]
                if None not in texts:
                    return "".join(texts)  # type: ignore[arg-type]
        return self._through_bytes(token_ids)

    def _through_bytes(self, token_ids: Sequence[int]) -> str:
        table, found, said = self._table, b"", ""
        for token_id in token_ids:
            text = table[token_id]
            if token_id in self._marks:
                # No bytes of it: what was incomplete before it stays so.
                said += self._decoder.decode(found, final=True) + self._marks[token_id]
                found = b""
                continue
            found += table.pieces[token_id] if text is None else text.encode()
        text = said + self._decoder.decode(found)
        self._pending = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        """Return the replacement of an incomplete character, if there is one."""
        self._pending = False
        return self._decoder.decode(b"", final=True)


class ByteFallbackTable(TokenTable):
    """Words with ``▁`` for a space; a token ``<0xNN>`` is one byte, and is in ``byte_of``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.byte_of: dict[int, int] = {}
        self.silent: set[int] = set()

    def __missing__(self, token_id: int) -> str | None:
        text = super().__missing__(token_id)
        if text == "":
            self.silent.add(token_id)
        return text

    def text_of(self, token_id: int, token: str) -> str | None:
        """Return the text, or None for a byte."""
        if byte := _BYTE_TOKEN.fullmatch(token):
            self.byte_of[token_id] = int(byte[1], 16)
            return None
        return token.replace("▁", " ")


class ByteFallbackDetokenizer:
    """Byte fallback: a run of byte tokens is text if all of it is UTF-8, else one U+FFFD a byte.

    A run is therefore withheld until it is over. ``strip`` spaces are taken from the beginning of the text.
    """

    def __init__(self, table: ByteFallbackTable, strip: int) -> None:
        self._table = table
        self._run = bytearray()
        self._strip = strip

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        if not self._run and not self._strip and len(token_ids) == 1:
            text = self._table[token_ids[0]]
            if text is not None:
                return text
        found = ""
        for token_id in token_ids:
            text = self._table[token_id]
            if text is None:
                self._run.append(self._table.byte_of[token_id])
            elif token_id not in self._table.silent:
                found += self._end_run() + text
        return self._stripped(found)

    def finish(self) -> str:
        """Return the last run."""
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text.startswith(" "):
            text = text[1:]
            self._strip -= 1
        if text:
            self._strip = 0
        return text


class StreamDetokenizer:
    """Any other decoder, through the tokenizer's own stream: slower, and as exact as that is."""

    def __init__(self, tokenizer: Tokenizer, marks: Mapping[int, str]) -> None:
        self._tokenizer, self._marks = tokenizer, marks
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._given = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        found = ""
        for token_id in token_ids:
            mark = self._marks.get(token_id)
            if mark is None:
                self._token_ids.append(token_id)
                text = self._stream.step(self._tokenizer, token_id) or ""
                self._given += text
            found += text if mark is None else mark
        return found

    def finish(self) -> str:
        """Return what the whole decoding has beyond what was given out."""
        whole: str = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        return whole[len(self._given) :] if whole.startswith(self._given) else ""


class DetokenizerFactory:
    """Chooses the detokenizer of a tokenizer once; its tables are shared by all choices."""

    def __init__(self, tokenizer: Tokenizer | TiktokenVocabulary) -> None:
        self._tokenizer = tokenizer
        self._marks: Mapping[int, str] = {}
        self._byte_level: ByteLevelTable | TiktokenTable | None = None
        self._strip: int | None = None
        self._byte_fallback: ByteFallbackTable | None = None
        if isinstance(tokenizer, TiktokenVocabulary):
            self._byte_level = TiktokenTable(tokenizer)
            return
        decoder: dict[str, Any] = json.loads(tokenizer.to_str()).get("decoder") or {}
        if decoder.get("type") == "ByteLevel":
            self._byte_level = ByteLevelTable(tokenizer)
        self._strip = _byte_fallback_strip(decoder)
        self._byte_fallback = ByteFallbackTable(tokenizer) if self._strip is not None else None

    def marked(self, marks: Mapping[int, str]) -> "DetokenizerFactory":
        """Return another factory, whose detokenizers give some special tokens a text."""
        found = DetokenizerFactory(self._tokenizer)
        found._marks = marks
        for table in (found._byte_level, found._byte_fallback):
            if table is not None:
                table.update(marks)
        return found

    def make(self) -> Detokenizer:
        """Return a detokenizer for one choice."""
        if self._byte_level is not None:
            return ByteLevelDetokenizer(self._byte_level, self._marks)
        if self._byte_fallback is not None:
            return ByteFallbackDetokenizer(self._byte_fallback, self._strip or 0)
        assert isinstance(self._tokenizer, Tokenizer)
        return StreamDetokenizer(self._tokenizer, self._marks)


def _byte_fallback_strip(decoder: dict[str, Any]) -> int | None:
    """Return how many leading spaces Llama's chain of decoders strips; None for another chain."""
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else []
    plain = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    plain.append({"type": "Fuse"})
    if steps[:3] != plain:
        return None
    match steps[3:]:
        case []:
            return 0
        case [{"type": "Strip", "content": " ", "start": int(start), "stop": 0}]:
            return start
        case _:
            return None


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
