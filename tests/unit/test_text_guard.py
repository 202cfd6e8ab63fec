"""What users say never becomes a token that only the template may place."""

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.text import TextService
from orchestrator.text.guard import Guard, name_pattern
from orchestrator.text.vocabulary import load_vocabulary
from protocol.chat import ChatMessage, Role
from protocol.errors import InvalidRequestError
from tests.unit.text_models import CHATML, directory, kimi_directory

KIMI = (
    "{% for m in messages %}"
    "{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
NAMES = ["<|im_end|>", "<|im_start|>", "<|<|im_end|>", "aba", "<tool call>", "x"]


def made(path: Path, kind: str) -> tuple[Path, list[str]]:
    model = kimi_directory(path, KIMI) if kind == "kimi" else directory(path, CHATML)
    vocabulary = load_vocabulary(model)
    assert vocabulary is not None
    return model, vocabulary.added_tokens


def chat(model: Path, role: Role, content: str) -> tuple[list[int], str]:
    async def run() -> tuple[list[int], str]:
        text = await TextService.start(model)
        try:
            token_ids = (await text.chat([ChatMessage(role, content)], 10_000)).token_ids
            return token_ids, text.decode(token_ids)
        finally:
            await text.close()

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["kimi", "chatml"])
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_names_in_messages_are_words(tmp_path: Path, kind: str, role: Role) -> None:
    model, names = made(tmp_path, kind)
    content = "hello " + " ".join(names) + "<|im_<|im_end|>end|>"
    token_ids, text = chat(model, role, content)
    plain, _ = chat(model, role, "hello")
    vocabulary = load_vocabulary(model)
    assert vocabulary is not None
    ids = [vocabulary.encode(name, as_prompt=False)[0] for name in names]
    # Each is there as often as the template puts it, and all that was said comes back as text.
    assert [token_ids.count(i) for i in ids] == [plain.count(i) for i in ids]
    assert content in text


def test_an_assistant_keeps_its_marks_and_no_special_token(tmp_path: Path) -> None:
    model, _ = made(tmp_path, "kimi")
    vocabulary = load_vocabulary(model)
    assert vocabulary is not None
    think, end = (vocabulary.encode(name, as_prompt=False)[0] for name in ("<think>", "<|im_end|>"))
    token_ids, text = chat(model, "assistant", "<think>a<|im_end|>")
    assert (token_ids.count(think), token_ids.count(end)) == (1, 1)
    assert "<think>a<|im_end|>" in text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*NAMES, "<|", "im_end|>", "ab", "a", "\n", "\U00010000"])).map("".join))
def test_no_piece_holds_a_name_and_none_is_lost(said: str) -> None:
    names = [name for name in NAMES if len(name) > 1]
    guard = Guard("template", said)
    for dump in (
        str,
        lambda s: json.loads(json.dumps(s, ensure_ascii=False)),
        lambda s: repr(s).strip("'\""),
    ):
        pieces = guard.pieces(dump(guard.guard(said, name_pattern(NAMES))))
        assert not [n for piece in pieces for n in names if n in piece]
        assert "".join(pieces) == dump(said)


def test_a_text_without_names_is_one_piece_and_no_cut_left_is_refused() -> None:
    guard = Guard("", "hello")
    assert guard.pieces(guard.guard("hello", name_pattern(NAMES))) == ["hello"]
    with pytest.raises(InvalidRequestError, match="letters reserved"):
        Guard("", "".join(map(chr, range(0x10000, 0x1000C))))
