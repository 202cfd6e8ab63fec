"""The published formats of tool calls: how a section of calls opens and closes, and what is in it.

Sources: the model cards and chat templates of Kimi K2, Qwen3 and Hermes, Llama 3.1 and 4, DeepSeek-V3.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from orchestrator.text.parsers.pythonic import read_calls

_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_KIMI_ID: Final = re.compile(r"(?:functions\.)?([A-Za-z0-9_.\-]{1,64}):[0-9]{1,9}")
_JSON: Final = json.JSONDecoder()
_SPACE: Final = " \n\r\t"


@dataclass(frozen=True, slots=True)
class Call:
    """One call as the model wrote it; ``id`` is None where its format has none."""

    name: str
    arguments: str
    id: str | None = None


Reader = Callable[[str], list[Call]]
"""From what is between a section's marks to its calls; ``ValueError`` where these are none."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models calls tools."""

    name: str
    open: str
    close: str
    read: Reader
    bare: bool = False
    """A whole answer may be calls without marks: a list ``[…]`` or an object ``{…}``."""
    inside: tuple[str, ...] = ()
    """Names of other marks, between the two."""


def _json_object(text: str) -> str:
    text = text.strip(_SPACE)
    if not isinstance(_decoded(text), dict):
        raise ValueError("arguments are a JSON object")
    return text


def _decoded(text: str) -> object:
    try:
        found: object = json.loads(text, parse_constant=_refuse_constant)
        return found
    except RecursionError:
        raise ValueError("nested too deep") from None


def _refuse_constant(word: str) -> object:
    raise ValueError(f"{word} is not JSON")


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError("not the name of a function")
    return name


def _read_object(text: str) -> list[Call]:
    """Read ``{"name": …, "arguments": {…}}`` (or ``parameters``); arguments stay as they were written."""
    text = text.strip(_SPACE)
    if not isinstance(_decoded(text), dict):
        raise ValueError("a call is an object")
    found: dict[str, str] = {}
    at = 1
    while True:
        at = _after_space(text, at)
        if text[at] == "}":
            break
        key, at = _JSON.raw_decode(text, at)
        start = _after_space(text, _after_space(text, at) + 1)
        _, at = _JSON.raw_decode(text, start)
        if key in found:
            raise ValueError(f"{key} is given twice")
        found[key] = text[start:at]
        at = _after_space(text, at)
        at += text[at] == ","
    arguments = [found[key] for key in ("arguments", "parameters") if key in found]
    if (
        "name" not in found
        or len(arguments) != 1
        or set(found) - {"name", "arguments", "parameters", "type"}
    ):
        raise ValueError("a call has a name and arguments")
    return [Call(_checked_name(json.loads(found["name"])), _json_object(arguments[0]))]


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in _SPACE:
        at += 1
    return at


def _read_llama(text: str) -> list[Call]:
    text = text.strip(_SPACE)
    if text.startswith("{"):
        return _read_object(text)
    return [Call(name, arguments) for name, arguments in read_calls(text)]


def _read_kimi(text: str) -> list[Call]:
    calls = []
    for call in _in_marks(text, "<|tool_call_begin|>", "<|tool_call_end|>"):
        head, mark, arguments = call.partition("<|tool_call_argument_begin|>")
        call_id = head.strip(_SPACE)
        found = _KIMI_ID.fullmatch(call_id)
        if not mark or found is None:
            raise ValueError("a call has an id functions.NAME:NUMBER and arguments")
        calls.append(Call(found[1], _json_object(arguments), call_id))
    return calls


def _read_deepseek(text: str) -> list[Call]:
    calls = []
    for call in _in_marks(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"):
        kind, mark, rest = call.partition("<｜tool▁sep｜>")
        name, fence, arguments = rest.partition("\n```json\n")
        arguments, end, after = arguments.rpartition("\n```")
        if kind != "function" or not mark or not fence or not end or after.strip(_SPACE):
            raise ValueError("a call is of a function, with arguments in a fence")
        calls.append(Call(_checked_name(name), _json_object(arguments)))
    return calls


def _in_marks(text: str, begin: str, end: str) -> list[str]:
    """Return what stands between marks, where nothing but space is outside them."""
    found = []
    at = _after_space(text, 0)
    while at < len(text):
        close = text.find(end, at)
        if not text.startswith(begin, at) or close < 0:
            raise ValueError("something else between calls")
        found.append(text[at + len(begin) : close])
        at = _after_space(text, close + len(end))
    if not found:
        raise ValueError("no calls")
    return found


KIMI: Final = ToolFormat(
    "kimi",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    _read_kimi,
    inside=("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)
DEEPSEEK: Final = ToolFormat(
    "deepseek",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    _read_deepseek,
    inside=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
)
HERMES: Final = ToolFormat("hermes", "<tool_call>", "</tool_call>", _read_object)
LLAMA: Final = ToolFormat("llama", "<|python_start|>", "<|python_end|>", _read_llama, bare=True)

_FOUND_BY: Final = (
    ("<|tool_calls_section_begin|>", KIMI),
    ("<｜tool▁calls▁begin｜>", DEEPSEEK),
    ("<tool_call>", HERMES),
    ("<|python_start|>", LLAMA),
    ("<|python_tag|>", LLAMA),
)
"""The first mark that a checkpoint knows decides."""


def find_format(template: str, added_tokens: Iterable[str]) -> tuple[ToolFormat | None, bool]:
    """Return how a checkpoint calls tools (None: not in a form known here), and whether it thinks first.

    Its chat template is asked first, then the names in its vocabulary.
    """
    known = frozenset(added_tokens)
    thinks = "</think>" in template or "</think>" in known
    for is_known in (template.__contains__, known.__contains__):
        for mark, tool_format in _FOUND_BY:
            if is_known(mark):
                return tool_format, thinks
    return None, thinks
