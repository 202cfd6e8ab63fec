"""``tandem chat`` on a real terminal, looked at as a person would."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import StartFake
from tests.terminal_screen import ALT_ENTER, CTRL_C, CTRL_D, ENTER, TerminalProgram

CHAT = [sys.executable, "-P", "-m", "cli", "chat"]


@pytest.fixture
def chat(
    start_fake: StartFake, environment: dict[str, str], tmp_path: Path
) -> Iterator[tuple[TerminalProgram, "subprocess.Popen[str]"]]:
    server = start_fake()
    with TerminalProgram(CHAT, environment, str(tmp_path)) as terminal:
        terminal.wait_for_prompt()
        yield terminal, server


Chat = tuple[TerminalProgram, "subprocess.Popen[str]"]


def test_it_says_what_is_served_and_ctrl_d_leaves(chat: Chat) -> None:
    terminal, server = chat
    assert terminal.lines[0] == "fake · tp 2 pp 1 · float32 · context 512"
    assert "Ctrl-D leaves" in terminal.lines[1]
    terminal.ask("hello")
    assert "echo: 'hello'" in terminal.lines
    terminal.send(CTRL_D)
    assert terminal.wait_end() == 0
    assert server.poll() is None


def test_an_answer_appears_while_it_is_made_and_ctrl_c_stops_only_it(chat: Chat) -> None:
    terminal, server = chat
    terminal.send("say 100000" + ENTER)
    terminal.wait_for("word3 ")
    assert "word400 " not in terminal.text
    terminal.wait_for("word20 ")
    terminal.send(CTRL_C)
    terminal.wait_for("(stopped)")
    terminal.wait_for_prompt(1)
    terminal.ask("still there")
    assert "echo: 'still there'" in terminal.lines
    terminal.ask("/stats")
    assert "0 running" in terminal.text
    assert "1 cancelled" in terminal.text
    shown = terminal.prompts
    terminal.send(CTRL_C)
    terminal.wait_for("/quit leaves")
    terminal.wait_for_prompt(shown)
    terminal.send("/quit" + ENTER)
    assert terminal.wait_end() == 0
    assert server.poll() is None


def test_messages_of_several_lines(chat: Chat) -> None:
    terminal, _ = chat
    terminal.ask(f"one{ALT_ENTER}two\\{ENTER}three")
    assert "echo: 'one\\ntwo\\nthree'" in terminal.lines
    terminal.ask("\x1b[200~pasted\nlines\x1b[201~")
    assert "echo: 'pasted\\nlines'" in terminal.lines


def test_commands(chat: Chat, tmp_path: Path) -> None:
    terminal, _ = chat
    terminal.ask("/system be brief")
    terminal.ask("system?")
    assert "be brief" in terminal.lines
    terminal.ask("/set temperature 0")
    terminal.ask("/set seed 4")
    terminal.ask("/set max_tokens 9")
    terminal.ask("sampling?")
    assert "t=0.0 seed=4 max=9" in terminal.lines
    terminal.ask("/regenerate")
    assert "t=0.0 seed=5 max=9" in terminal.lines
    terminal.ask("/save talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", *["user", "assistant"] * 2]
    assert saved["messages"][-1]["content"] == "t=0.0 seed=5 max=9"
    terminal.ask("/set temperature hot")
    assert "temperature = 'hot' does not do" in terminal.text
    terminal.ask("/clear")
    terminal.ask("turns?")
    assert "2" in terminal.lines


def test_history_is_there_the_next_time(chat: Chat, environment: dict[str, str], tmp_path: Path) -> None:
    terminal, _ = chat
    terminal.ask("remember me")
    terminal.send(CTRL_D)
    assert terminal.wait_end() == 0
    with TerminalProgram(CHAT, environment, str(tmp_path)) as again:
        again.wait_for_prompt()
        again.send("\x1b[A")
        again.wait_for("> remember me")


@pytest.mark.parametrize("when", ["idle", "typing", "mid-answer"])
def test_a_server_that_dies_ends_the_chat_with_an_error(chat: Chat, when: str) -> None:
    terminal, server = chat
    if when == "typing":
        terminal.send("some words")
        terminal.wait_for("> some words")
    elif when == "mid-answer":
        terminal.send("say 100000" + ENTER)
        terminal.wait_for("word5 ")
    died = time.monotonic()
    server.kill()
    terminal.wait_for("Error: the server")
    assert time.monotonic() - died < 5
    assert terminal.wait_end() == 1
    assert "Traceback" not in terminal.text


def test_what_the_model_says_does_not_steer_the_terminal(chat: Chat) -> None:
    terminal, _ = chat
    terminal.ask("/system \x1b[200~\x1b]0;owned\x07\x1b[2Jafter\x1b[201~")
    terminal.ask("system?")
    assert any("after" in line for line in terminal.lines)
    assert terminal.lines[0].startswith("fake")


def test_no_colour_where_none_is_wanted(
    start_fake: StartFake, environment: dict[str, str], tmp_path: Path
) -> None:
    start_fake()
    with TerminalProgram(CHAT, environment | {"NO_COLOR": "1"}, str(tmp_path)) as terminal:
        terminal.wait_for_prompt()
        terminal.ask("/help")
        assert not terminal.has_colour
