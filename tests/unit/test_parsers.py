"""Parsers of answers: the same for any cut, and no character lost, invented or said twice."""

import itertools
import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.text.parsers import (
    Parser,
    ParserEvent,
    ReasoningDelta,
    TextDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
    ToolCallEnd,
    ToolFormat,
    find_format,
)
from orchestrator.text.parsers import parser as parser_module
from orchestrator.text.parsers.formats import DEEPSEEK, HERMES, KIMI, LLAMA
from orchestrator.text.parsers.pythonic import MAX_DEPTH, read_calls

ARGUMENTS = '{"city": "Bérn }</", "n": [1, {"x": "\\"]"}]}'
CALLS = {
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    + ARGUMENTS
    + "<|tool_call_end|>\n<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "hermes": '<tool_call>\n{"name": "f", "arguments": ' + ARGUMENTS + "}\n</tool_call>",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    + ARGUMENTS
    + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "llama": '<|python_start|>[f(city="Bérn", n=[1, {"x": None}]), g.h()]<|python_end|>',
}
BARE = (
    '[f(city="B]érn", n=-1.5)]',
    '{"name": "f", "parameters": {"a": "}"}}',
    "[f()]",
    "[1, 2]",
    "{]",
    '["',
)
FORMATS = {"kimi": KIMI, "hermes": HERMES, "deepseek": DEEPSEEK, "llama": LLAMA}
# A call's own shape, with holes for what its events say.
SHAPES = {
    "kimi": r"<\|tool_call_begin\|>{id}<\|tool_call_argument_begin\|>{arguments}"
    r"<\|tool_call_end\|>\s*",
    "hermes": '<tool_call>\\s*{{"name": "{name}", "arguments": {arguments}}}\\s*</tool_call>',
    "deepseek": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
    "<｜tool▁call▁end｜>",
}


def parser(tools: ToolFormat | None, *, is_thinking: bool = False) -> Parser:
    return Parser(tools, thinks=True, is_thinking=is_thinking, make_id=lambda index: f"call_{index}")


def run(made: Parser, pieces: Sequence[str]) -> list[ParserEvent]:
    """Return all events, neighbouring deltas of one channel joined."""
    found: list[ParserEvent] = []
    for event in [e for piece in pieces for e in made.push(piece)] + made.finish():
        last = found[-1] if found else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            found[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            found[-1] = ReasoningDelta(last.text + event.text)
        else:
            found.append(event)
    return found


def cut(text: str, cuts: list[int]) -> list[str]:
    at = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(at)]


@st.composite
def answers(draw: st.DrawFn, name: str) -> str:
    """Words, marks, pieces of marks, and calls whole, cut short or spoilt."""
    tools, call = FORMATS[name], CALLS[name]
    marks = [tools.open, tools.close, "<think>", "</think>", *re.findall("<[^<>]*>", call)]
    piece = st.one_of(
        st.sampled_from([*marks, call, *BARE, "\n", " ", "<", "{", "[f(", "</"]),
        st.sampled_from([*marks, call]).flatmap(lambda m: st.integers(0, len(m)).map(lambda n: m[:n])),
        st.sampled_from([*marks, call]).flatmap(lambda m: st.integers(0, len(m)).map(lambda n: m[n:])),
        st.text(max_size=5),
    )
    return "".join(draw(st.lists(piece, max_size=8)))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_cut_gives_the_same_events_and_the_source_is_in_them(name: str, data: st.DataObject) -> None:
    source = data.draw(answers(name))
    is_thinking = data.draw(st.booleans())
    tools = data.draw(st.sampled_from([FORMATS[name], None]))
    events = run(parser(tools, is_thinking=is_thinking), [source])
    cuts = data.draw(st.lists(st.integers(0, 10_000), max_size=12))
    assert run(parser(tools, is_thinking=is_thinking), cut(source, cuts)) == events
    assert run(parser(tools, is_thinking=is_thinking), list(source)) == events
    assert recovers(name, events, source), events


def recovers(name: str, events: list[ParserEvent], source: str) -> bool:
    """Whether the source is these events in order with nothing but marks around them."""
    tools = FORMATS[name]
    begins, ends = f"(?:{re.escape(tools.open)}\\s*)?", f"(?:{re.escape(tools.close)})?"
    pattern, at = "", 0
    while at < len(events):
        match events[at]:
            case TextDelta(text=text):
                pattern += "(?:<think>)?(?:</think>)?" + re.escape(text)
                at += 1
            case ReasoningDelta(text=text):
                pattern += "(?:<think>)?" + re.escape(text)
                at += 1
            case ToolCallBegin(index=index, id=call_id, name=function):
                arguments, end = events[at + 1 : at + 3]
                assert isinstance(arguments, ToolArgumentsDelta)
                assert end == ToolCallEnd(index)
                assert isinstance(json.loads(arguments.text), dict)
                pattern += "(?:<think>)?(?:</think>)?"
                if name == "llama":  # Its arguments are not the source's characters.
                    pattern += f"(?:{begins}[\\[{{,].*?[)}}]\\]?{ends}|, g\\.h\\(\\)\\]{ends})"
                else:
                    shape = SHAPES[name].format(
                        id=re.escape(call_id), name=re.escape(function), arguments=re.escape(arguments.text)
                    )
                    pattern += shape if name == "hermes" else begins + shape + ends
                at += 3
    return re.fullmatch(pattern + "(?:<think>)?(?:</think>)?", source, re.DOTALL) is not None


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_found_with_text_and_reasoning_around_them(name: str) -> None:
    events = run(parser(FORMATS[name], is_thinking=True), [f"hm</think>so {CALLS[name]} ok"])
    calls = [e for e in events if isinstance(e, ToolCallBegin)]
    assert [events[0], events[1], events[-1]] == [ReasoningDelta("hm"), TextDelta("so "), TextDelta(" ok")]
    assert calls[0].name == "f"
    assert calls[0].id == ("functions.f:0" if name == "kimi" else "call_0")
    assert len(calls) == {"kimi": 2, "llama": 2}.get(name, 1)
    given_arguments = next(e for e in events if isinstance(e, ToolArgumentsDelta)).text
    if name == "llama":
        assert given_arguments == '{"city": "Bérn", "n": [1, {"x": null}]}'
    else:
        assert given_arguments == ARGUMENTS


@pytest.mark.parametrize("source", BARE)
def test_a_whole_answer_of_llama_may_be_calls(source: str) -> None:
    events = run(parser(LLAMA), [source])
    if "f" in source:
        assert isinstance(events[0], ToolCallBegin)
        assert len(events) == 3
    else:
        assert events == [TextDelta(source)]
    assert run(parser(LLAMA), ["so: " + source]) == [TextDelta("so: " + source)]


def test_without_tools_calls_are_text_and_unfinished_ones_always() -> None:
    for name, call in CALLS.items():
        assert run(parser(None), [call]) == [TextDelta(call)]
        assert run(parser(FORMATS[name]), [call[:-1]]) == [TextDelta(call[:-1])]


def test_a_section_beyond_its_bound_is_text_for_any_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser_module, "MAX_SECTION", 60)
    for size in range(70):
        source = '<tool_call>{"name": "f", "arguments": {}}' + " " * size + "</tool_call>x"
        events = run(parser(HERMES), [source])
        assert run(parser(HERMES), list(source)) == events
        assert (events == [TextDelta(source)]) == (source.index("</tool_call>") > 60)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "[]",
            "[f]",
            "[f(]",
            "[f(1)]",
            "[f(a=1, a=2)]",
            "[f(a=b)]",
            "[f(a=1)] x",
            "[f(a='x)]",
            "[f(a=1e999)]",
        ),
        *("[f(a=__import__('os'))]", "[f(a='\\ud800')]", "[f(a='\\U00110000')]", "[f(a='\\x1')]", "f(a=1)"),
        "[f(a=" + "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2) + ")]",
        "[f(a=" + "[" * 100_000,
        "[f(a=" + "9" * 5000 + ")]",
    ],
)
def test_what_is_no_list_of_literal_calls_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_calls(text)


LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab'\"\\é\n", max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), LITERALS, max_size=3))
def test_python_literals_are_read_as_python_reads_them(arguments: dict[str, object]) -> None:
    written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    ((name, found),) = read_calls(f"[f({written})]")
    assert (name, json.loads(found)) == ("f", arguments)


def test_a_checkpoint_says_which_format_it_uses() -> None:
    assert find_format("…<tool_call>…", ["<|python_tag|>"]) == (HERMES, False)
    assert find_format("", ["<|tool_calls_section_begin|>", "</think>"]) == (KIMI, True)
    assert find_format("<｜tool▁calls▁begin｜></think>", []) == (DEEPSEEK, True)
    assert find_format("{{ x }}", ["<|python_start|>"]) == (LLAMA, False)
    assert find_format("{{ x }}", ["<|im_end|>"]) == (None, False)
