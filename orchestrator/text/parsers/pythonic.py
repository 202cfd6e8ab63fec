"""Llama 4's calls: a list of Python calls with keyword arguments, read without Python's own parser.

``ast`` recurses in C as deep as the model nests, and takes far more than literals. This reads literals
alone, to a fixed depth, each character once.
"""

import json
import math
import re
from typing import Any, Final

MAX_DEPTH: Final = 32
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,63}")
_NUMBER: Final = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WORDS: Final = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", "'": "'", '"': '"'}
_HEX: Final = {"x": 2, "u": 4, "U": 8}


def read_calls(text: str) -> list[tuple[str, str]]:
    """Return the names of the functions and their arguments as JSON.

    Errors: ``ValueError`` for what is not a list of at least one call.
    """
    return _Reader(text).calls()


class _Reader:
    """A position in a text that moves forward."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def calls(self) -> list[tuple[str, str]]:
        self._expect("[")
        found = [self._call()]
        while not self._comes("]"):
            self._expect(",")
            found.append(self._call())
        self._space()
        if self._at != len(self._text):
            raise ValueError("more after the calls")
        return found

    def _call(self) -> tuple[str, str]:
        name = self._match(_NAME)
        arguments: dict[str, Any] = {}
        self._expect("(")
        while not self._comes(")"):
            if arguments:
                self._expect(",")
            key = self._match(_NAME)
            self._expect("=")
            if key in arguments:
                raise ValueError(f"{key} is given twice")
            arguments[key] = self._value(0)
        found = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        found.encode()  # Half of a surrogate pair is not text: UnicodeEncodeError is a ValueError.
        return name, found

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        if self._comes("["):
            items: list[Any] = []
            while not self._comes("]"):
                if items:
                    self._expect(",")
                items.append(self._value(depth + 1))
            return items
        if self._comes("{"):
            return self._object(depth)
        self._space()
        if self._text[self._at : self._at + 1] in ("'", '"'):
            return self._string()
        if number := _NUMBER.match(self._text, self._at):
            self._at = number.end()
            digits = number[0].lstrip("-")
            if digits.isdecimal():
                return int(number[0])
            value = float(number[0])
            if not math.isfinite(value):
                raise ValueError("a number beyond a float")
            return value
        return _WORDS[self._match(_NAME, _WORDS)]

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._comes("}"):
            if found:
                self._expect(",")
            self._space()
            key = self._string()
            self._expect(":")
            if key in found:
                raise ValueError(f"{key!r} is given twice")
            found[key] = self._value(depth + 1)
        return found

    def _string(self) -> str:
        text, quote = self._text, self._text[self._at : self._at + 1]
        if quote not in ("'", '"'):
            raise ValueError("not a string")
        self._at += 1
        parts = []
        while (character := text[self._at : self._at + 1]) != quote:
            self._at += 1
            if not character or character == "\n":
                raise ValueError("a string without an end")
            parts.append(self._escape() if character == "\\" else character)
        self._at += 1
        return "".join(parts)

    def _escape(self) -> str:
        kind = self._text[self._at : self._at + 1]
        self._at += 1
        if kind in _HEX:
            digits = self._text[self._at : self._at + _HEX[kind]]
            if len(digits) != _HEX[kind] or not re.fullmatch("[0-9A-Fa-f]+", digits):
                raise ValueError("an escape without its digits")
            self._at += len(digits)
            return chr(int(digits, 16))
        return _ESCAPES.get(kind, "\\" + kind)

    def _space(self) -> None:
        while self._text[self._at : self._at + 1] in (" ", "\n", "\t", "\r"):
            self._at += 1

    def _comes(self, mark: str) -> bool:
        self._space()
        found = self._text.startswith(mark, self._at)
        self._at += found
        return found

    def _expect(self, mark: str) -> None:
        if not self._comes(mark):
            raise ValueError(f"{mark} is missing")

    def _match(self, pattern: re.Pattern[str], known: dict[str, Any] | None = None) -> str:
        self._space()
        found = pattern.match(self._text, self._at)
        if found is None or (known is not None and found[0] not in known):
            raise ValueError("not a name or a literal")
        self._at = found.end()
        return found[0]
