"""Reasoning and tool calls over the whole wire: what a model says, in tokens, to what a client reads."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from orchestrator.request import Request
from orchestrator.text.parsers import Parser, ReasoningDelta, TextDelta, ToolArgumentsDelta, ToolCallBegin
from orchestrator.text.parsers.formats import KIMI
from orchestrator.text.speech import Speech
from protocol.chat import FunctionCall, ToolCall
from protocol.client import Cancelled, Delta, Failed, Finished, Started
from tandem.results import Collector, Result
from tests.unit.gateway_fakes import FakeEngine, RawClient, raw, serving
from tests.unit.text_models import byte_level, directory

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{{ messages[0].content }}<think>{{ '' }}"
)
CLOSED = TEMPLATE.replace("<think>", "</think>")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"é": [1, "€"]}}\n</tool_call>'
MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
PIECES = (
    *("hello ", "日本", "é", "<tool_", "call>", "<", "think", ">", '{"name": ', "\n", "}", "€😀"),
    *(CALL, "<think>", "</think>", "<tool_call>", "</tool_call>", "[f(a=1)]"),
)


def tokenizer(*, special: bool) -> Tokenizer:
    found = byte_level()
    marks = [AddedToken(mark, special=special) for mark in MARKS]
    (found.add_special_tokens if special else found.add_tokens)(marks)
    return found


class Model:
    """A model that says what it is told, token by token."""

    def __init__(self, path: Path, template: str = TEMPLATE, *, special: bool = False) -> None:
        self.tokenizer = tokenizer(special=special)
        self.path = directory(path, template, self.tokenizer)
        self.script: list[int] = []

    def engine(self, tokens_a_step: int) -> FakeEngine:
        return FakeEngine(self.next, tokens_a_step)

    def next(self, request: Request) -> int:
        end: int = self.tokenizer.token_to_id("<|im_end|>")
        at = request.num_output
        return self.script[at] if at < len(self.script) else end

    def say(self, text: str) -> None:
        self.script = self.tokenizer.encode(text).ids


def end_of(path: Path) -> None:
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')


async def result_of(client: RawClient, **fields: Any) -> Result:
    fields = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400} | fields
    stream = client.ask(**fields)
    await client.event(stream, Finished)
    collector = Collector()
    for event in client.of(stream):
        assert isinstance(event, Started | Delta | Finished)
        collector.take(event)
    found = collector.result()
    assert found is not None
    return found


def read(text: str, parser: Parser | None) -> tuple[str, str, list[FunctionCall]]:
    """What a parser makes of a whole text."""
    assert parser is not None
    said, thought, names, arguments = "", "", [], []
    for event in parser.push(text) + parser.finish():
        match event:
            case TextDelta():
                said += event.text
            case ReasoningDelta():
                thought += event.text
            case ToolCallBegin():
                names.append(event.name)
            case ToolArgumentsDelta():
                arguments.append(event.text)
    return said, thought, [FunctionCall(*pair) for pair in zip(names, arguments, strict=True)]


@pytest.mark.parametrize("special", [False, True])
def test_thoughts_text_and_calls_come_apart(tmp_path: Path, special: bool) -> None:
    async def run() -> None:
        model = Model(tmp_path, special=special)
        end_of(tmp_path)
        model.say("I think é.</think>Hello €." + CALL + CALL)
        async with serving(tmp_path, model.engine(3)) as server, raw(server) as client:
            found = await result_of(client, tools=TOOLS)
            assert (found.reasoning, found.text) == ("I think é.", "Hello €.")
            assert found.finish_reason == "tool_calls"
            expected = FunctionCall("f", '{"é": [1, "€"]}')
            assert [call.function for call in found.tool_calls] == [expected, expected]
            assert len({call.id for call in found.tool_calls}) == 2
            # A call is sent back as it is.
            again: list[Any] = [{"role": "user", "content": "x"}, {"role": "assistant"}]
            again[1]["tool_calls"] = found.tool_calls
            assert isinstance(again[1]["tool_calls"][0], ToolCall)
            await result_of(client, messages=again, tools=TOOLS)
            server.assert_nothing_left()

    asyncio.run(run())


def test_without_tools_calls_are_text_and_raw_is_everything(tmp_path: Path) -> None:
    async def run() -> None:
        model = Model(tmp_path)
        end_of(tmp_path)
        said = "one</think>two" + CALL
        model.say(said)
        async with serving(tmp_path, model.engine(1)) as server, raw(server) as client:
            for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
                found = await result_of(client, **fields)
                assert (found.reasoning, found.text, found.tool_calls) == ("one", "two" + CALL, [])
                assert found.finish_reason == "stop"
            found = await result_of(client, tools=TOOLS, parse=False)
            assert (found.reasoning, found.text) == ("", said)
            found = await result_of(client, prompt="x", messages=None)
            assert found.text == said

    asyncio.run(run())


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("template", [TEMPLATE, CLOSED])
def test_nothing_is_lost_or_invented_whatever_the_cuts(
    tmp_path: Path, template: str, special: bool
) -> None:
    async def run() -> None:
        draw = random.Random(len(template) + special)
        model = Model(tmp_path, template, special=special)
        end_of(tmp_path)
        engine = model.engine(1)
        async with serving(tmp_path, engine) as server, raw(server) as client:
            for _ in range(60):
                text = "".join(draw.choices(PIECES, k=draw.randrange(1, 12)))
                model.say(text)
                engine.tokens_a_step = draw.choice((1, 2, 7, 50))
                limit = draw.choice((400, draw.randrange(1, 60)))
                stops = draw.choice(([], ["hello 日"], ["}"]))
                found = await result_of(client, tools=TOOLS, max_tokens=limit, stop=stops)
                speech = server.gateway._text.speech
                assert bool(speech.shown) == special
                detokenizer = speech.detokenizer()
                whole = detokenizer.push([t for t in found.token_ids if t != 2]) + detokenizer.finish()
                cut = min((at for stop in stops if (at := whole.find(stop)) >= 0), default=None)
                parser = speech.parser(calls=True, is_thinking=template == TEMPLATE)
                expected = read(whole if cut is None else whole[:cut], parser)
                assert (found.text, found.reasoning) == expected[:2]
                assert [call.function for call in found.tool_calls] == expected[2]
                if not special:
                    assert whole == model.tokenizer.decode(found.token_ids, skip_special_tokens=True)
            server.assert_nothing_left()

    asyncio.run(run())


def test_what_cannot_be_called_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        model = Model(tmp_path / "m")
        plain = directory(tmp_path / "p", "{{ messages[0].content }}<tool_call>", tokenizer(special=False))
        unknown = directory(tmp_path / "u", "{{ tools }}{{ messages[0].content }}", byte_level())
        named = {"type": "function", "function": {"name": "f"}}
        for path, fields, field in (
            (model.path, {"tool_choice": "required"}, "tool_choice"),
            (model.path, {"tool_choice": named}, "tool_choice"),
            (plain, {}, "tools"),
            (unknown, {}, "tools"),
        ):
            async with serving(tmp_path, model=path) as server, raw(server) as client:
                asked = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS} | fields
                failed = await client.event(client.ask(**asked), Failed)
                assert (failed.error.code, failed.error.field) == ("invalid_request", field)
                server.assert_nothing_left()
        async with serving(tmp_path, model=unknown) as server, raw(server) as client:
            assert (
                await result_of(client, tools=TOOLS, parse=False, max_tokens=3)
            ).finish_reason == "length"

    asyncio.run(run())


def test_a_cancelled_stream_in_the_middle_of_a_call_ends_once(tmp_path: Path) -> None:
    async def run() -> None:
        model = Model(tmp_path)
        model.script = model.tokenizer.encode("a</think><tool_call>" + "x" * 300).ids
        engine = model.engine(1)
        async with serving(tmp_path, engine) as server, raw(server) as client:

            def pausing(request: Request) -> int:
                # Nothing more comes until it is cancelled, however slow this machine is.
                server.is_paused = request.num_output == 30
                return model.next(request)

            engine.rule = pausing
            message = [{"role": "user", "content": "x"}]
            stream = client.ask(messages=message, tools=TOOLS, max_tokens=400)
            await client.until(lambda: len(client.of(stream, Delta)) > 20)
            client.send({"type": "cancel", "id": stream})
            await client.event(stream, Cancelled)
            assert "".join(d.text for d in client.of(stream, Delta)) == ""
            server.assert_nothing_left()

    asyncio.run(run())


def test_marks_that_are_special_tokens_are_seen_by_their_names(tmp_path: Path) -> None:
    found = byte_level()
    marks = [KIMI.open, KIMI.close, *KIMI.inside]
    found.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    directory(tmp_path, TEMPLATE, found)
    from orchestrator.text.detokenizer import DetokenizerFactory
    from orchestrator.text.vocabulary import load_vocabulary

    vocabulary = load_vocabulary(tmp_path)
    speech = Speech.of(KIMI.open + "{{ tools }}", vocabulary, DetokenizerFactory(found))
    assert set(speech.shown) == set(marks)
    parser = speech.parser(calls=True, is_thinking=False)
    assert parser is not None
    detokenizer = speech.detokenizer()
    call = '<|tool_call_begin|>functions.g:0<|tool_call_argument_begin|>{"a": "é"}<|tool_call_end|>'
    events = []
    for token_id in found.encode("ü" + KIMI.open + call + KIMI.close + "b" + KIMI.open).ids:
        events += parser.push(detokenizer.push([token_id]))
    events += parser.push(detokenizer.finish()) + parser.finish()
    assert [e.text for e in events if isinstance(e, TextDelta)] == ["ü", "b"]
    assert [(e.id, e.name) for e in events if isinstance(e, ToolCallBegin)] == [("functions.g:0", "g")]
    assert [e.text for e in events if isinstance(e, ToolArgumentsDelta)] == ['{"a": "é"}']
