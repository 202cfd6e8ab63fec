import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidRequestError, StorageError
from protocol.sampling import SamplingParams
from tandem.conversation import SETTABLE, Conversation, Settings
from tandem.render import printable, size, table


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("temperature", "0", 0.0),
        ("temperature", "1.5", 1.5),
        ("top_p", "0.9", 0.9),
        ("top_k", "40", 40),
        ("min_p", "0.05", 0.05),
        ("max_tokens", "12", 12),
        ("seed", "7", 7),
        ("repetition_penalty", "1.1", 1.1),
        ("presence_penalty", "-1", -1.0),
        ("frequency_penalty", "2", 2.0),
    ],
)
def test_a_setting_is_read_from_text_and_put_back(key: str, text: str, value: float) -> None:
    settings = Settings().with_text(key, text)
    assert settings.value(key) == value
    others = [k for k in SETTABLE if k != key]
    assert [settings.value(k) for k in others] == [Settings().value(k) for k in others]
    assert settings.with_text(key, "default") == Settings()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("temperature", "warm"),
        ("temperature", ""),
        ("top_p", "0"),
        ("top_k", "1.5"),
        ("max_tokens", "0"),
        ("seed", "-1"),
        ("seed", str(2**63)),
        ("logprobs", "3"),
        ("beauty", "1"),
    ],
)
def test_a_wrong_setting_names_its_key(key: str, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=key) as caught:
        Settings().with_text(key, text)
    assert caught.value.field == key


@given(st.sampled_from(SETTABLE), st.text(max_size=20))
def test_any_text_is_a_value_or_refused(key: str, text: str) -> None:
    refused = None
    try:
        Settings().with_text(key, text)
    except InvalidRequestError as error:
        refused = error.field
    assert refused in (None, key)


def test_turns_stay_in_pairs() -> None:
    talk = Conversation(Settings(), system="be brief")
    talk.ask("one")
    talk.answer("1")
    talk.ask("two")
    talk.answer("")
    assert [(m.role, m.content) for m in talk.messages()] == [
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "1"),
    ]
    talk.clear()
    assert [m.role for m in talk.messages()] == ["system"]


def test_drawing_again_counts_a_set_seed_up() -> None:
    talk = Conversation(Settings(SamplingParams(seed=2**63 - 1)))
    with pytest.raises(InvalidRequestError, match="no answer"):
        talk.ask_again()
    talk.ask("one")
    assert talk.sampling().seed == 2**63 - 1
    talk.answer("1")
    talk.ask_again()
    assert talk.sampling().seed == 0
    talk.answer("uno")
    talk.ask("two")
    assert talk.sampling().seed == 2**63 - 1
    assert Conversation(Settings()).sampling().seed is None


def test_a_conversation_is_saved_and_nothing_overwritten(tmp_path: Path) -> None:
    talk = Conversation(Settings().with_text("seed", "3"), system="be brief")
    talk.ask("caf\xe9?")
    talk.answer("yes")
    talk.save(tmp_path / "a.json", "m", replace=False)
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["model"] == "m"
    assert saved["settings"]["seed"] == 3
    assert [m["content"] for m in saved["messages"]] == ["be brief", "caf\xe9?", "yes"]
    talk.save(tmp_path / "a.md", "m", replace=False)
    assert "**user**\n\ncaf\xe9?\n" in (tmp_path / "a.md").read_text()
    with pytest.raises(StorageError, match="already"):
        talk.save(tmp_path / "a.md", "m", replace=False)
    talk.clear()
    talk.save(tmp_path / "a.md", "m", replace=True)
    assert "yes" not in (tmp_path / "a.md").read_text()
    with pytest.raises(StorageError, match="cannot be written"):
        talk.save(tmp_path / "none" / "a.md", "m", replace=False)


def test_sizes_and_tables() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 << 29, 1 << 50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 GiB",
        "1024.0 TiB",
    ]
    assert table(("A", "LONG"), [("xyz", "1"), ("", "22")], right=frozenset({1})) == (
        "A    LONG\nxyz     1\n       22"
    )


@given(st.text())
def test_a_terminal_gets_no_controls(text: str) -> None:
    shown = printable(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown)
    assert [c for c in text if c.isalnum()] == [c for c in shown if c.isalnum()]
