"""Templates and tokenising in helper processes: right, bounded, replaced."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.text import TextService
from orchestrator.text.template import ChatTemplate, TemplateSource
from protocol.chat import ChatMessage
from protocol.errors import ContextTooLongError, InvalidRequestError, ModelFormatError
from tests.unit.text_models import CHATML, byte_level, directory

TROUBLE = (
    "{% set said = messages[0]['content'] %}"
    "{% if said == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif said == 'eat' %}{% set x = namespace(s='x' * 99999) %}"
    "{% for a in range(99) %}{% set x.s = x.s + x.s %}{% endfor %}"
    "{% elif said == 'raise' %}{{ raise_exception('roles must alternate') }}"
    "{% elif said == 'escape' %}{{ ''.__class__.__mro__ }}"
    "{% elif said == 'mutate' %}{{ messages.append(1) }}"
    "{% else %}" + CHATML + "{% endif %}"
)


def said(text: str) -> list[ChatMessage]:
    return [ChatMessage("user", text)]


@asynccontextmanager
async def service(path: Path, **options: Any) -> AsyncIterator[TextService]:
    text = await TextService.start(path, **options)
    try:
        yield text
    finally:
        await text.close()


def helpers() -> list[int]:
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [
        p for p in map(int, found) if b"orchestrator.text.helper" in Path(f"/proc/{p}/cmdline").read_bytes()
    ]


def test_trouble_is_a_typed_error_and_the_others_go_on(tmp_path: Path) -> None:
    async def run() -> None:
        async with service(directory(tmp_path, TROUBLE), deadline_s=1.0, memory_bytes=64 << 20) as text:
            expected = byte_level().encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n").ids
            assert (await text.chat(said("hello"), 100)).token_ids == expected

            async def refused(what: str) -> str:
                with pytest.raises(InvalidRequestError) as caught:
                    await text.chat(said(what), 100)
                assert caught.value.field == "messages"
                return caught.value.message

            loop, eat, raised, escaped, mutated, good = await asyncio.gather(
                *(refused(w) for w in ("loop", "eat", "raise", "escape", "mutate")),
                text.chat(said("hello"), 100),
            )
            assert "chat template took more than 1 s" in loop
            assert "memory" in eat
            assert "roles must alternate" in raised
            assert "chat template" in escaped
            assert "chat template" in mutated
            assert good.token_ids == expected
            with pytest.raises(ContextTooLongError, match=r"tokens, the context holds 3"):
                await text.chat(said("hello"), 3)

    asyncio.run(run())


def test_long_prompts_are_tokenised_in_a_helper(tmp_path: Path) -> None:
    async def run() -> None:
        async with service(directory(tmp_path)) as text:
            words = "the quick brown fox é 😀 " * 500
            assert text.encode_short(words) is None
            assert await text.encode(words, 100_000) == byte_level().encode(words).ids
            assert text.encode_short("hello world") == byte_level().encode("hello world").ids
            with pytest.raises(ContextTooLongError) as caught:
                await text.encode(words, 10)
            assert caught.value.field == "prompt"

    asyncio.run(run())


def test_a_helper_that_dies_is_replaced_and_none_is_left(tmp_path: Path) -> None:
    async def run() -> None:
        async with service(directory(tmp_path)) as text:
            assert await text.chat(said("a"), 100)
            (helper,) = helpers()
            os.kill(helper, signal.SIGKILL)
            # Where its death is not known yet, that job alone is lost.
            (lost,) = await asyncio.gather(text.chat(said("b"), 100), return_exceptions=True)
            if isinstance(lost, BaseException):
                assert isinstance(lost, InvalidRequestError)
                assert "its process ended with -9" in lost.message
            assert await text.chat(said("c"), 100)
            (another,) = helpers()
            assert another != helper
        assert helpers() == []

    asyncio.run(run())


def test_a_terminals_ctrl_c_cannot_reach_a_helper(tmp_path: Path) -> None:
    async def run() -> None:
        async with service(directory(tmp_path)) as text:
            assert await text.chat(said("a"), 100)
            (helper,) = helpers()
            # The terminal signals a group of its session, from the moment that a process is made.
            assert os.getsid(helper) == helper

    asyncio.run(run())


def test_a_cancelled_job_costs_no_helper(tmp_path: Path) -> None:
    async def run() -> None:
        async with service(directory(tmp_path), helpers=1) as text:
            await text.chat(said("a"), 100)
            task = asyncio.create_task(text.encode("the quick " * 20000, 10**6))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await text.chat(said("hello"), 100)

    asyncio.run(run())


def test_without_a_tokenizer_text_is_refused_in_words(tmp_path: Path) -> None:
    async def run() -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
        async with service(tmp_path) as text:
            assert not text.has_tokenizer
            assert text.end_token_ids == {5, 7}
            detokenizer = text.detokenizer()
            assert detokenizer.push([1, 2]) + detokenizer.finish() == ""
            asked: list[Callable[[], Awaitable[Any]]] = [
                lambda: text.encode("x" * 9999, 9),
                lambda: text.chat(said("x"), 9),
            ]
            for ask in asked:
                with pytest.raises(InvalidRequestError, match=r"no tokenizer: send prompt_ids"):
                    await ask()
            with pytest.raises(InvalidRequestError, match=r"no tokenizer: send prompt_ids"):
                text.encode_short("x")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "\x00\x01"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("generation_config.json", '{"eos_token_id": [true]}'),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    directory(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelFormatError, match=name.replace(".", r"\.")):
        asyncio.run(TextService.start(tmp_path))


def render(path: Path, template: str, messages: list[dict[str, str]]) -> str:
    directory(path, None)
    (path / "chat_template.jinja").write_text(template)
    return ChatTemplate(TemplateSource(path)).render(messages)


def test_templates_see_what_they_were_written_for(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}\n    {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ eos_token }}{{ strftime_now('%Y') | length }}{{ tools is none }}{{ add_generation_prompt }}"
    )
    messages = [{"role": "user", "content": c} for c in ("é<", "b", "c")]
    assert render(tmp_path, template, messages) == (
        '<|im_start|>{"role": "user", "content": "é<"}{"role": "user", "content": "b"}<|im_end|>4TrueTrue'
    )


def test_a_template_that_does_not_compile_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="does not compile") as caught:
        render(tmp_path, "{% for %}", [])
    assert caught.value.field == "messages"


def test_rendering_equals_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = directory(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(path)
    messages = [
        {"role": "system", "content": "You are."},
        {"role": "user", "content": "  hello\n\nworld 😀 "},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "{{ x }}"},
    ]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(TemplateSource(path)).render(messages) == expected
