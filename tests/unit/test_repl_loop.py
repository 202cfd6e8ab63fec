"""The REPL against a client in memory: its commands, its interrupts, its keys."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from protocol.client import Stats, Timings, Usage
from protocol.errors import InstanceFailedError, InvalidRequestError, QueueFullError, TandemError
from tandem.conversation import Conversation, Settings
from tandem.render import Screen
from tandem.repl import Repl, check_can_chat
from tandem.repl_commands import COMMANDS, LeaveError
from tandem.results import Choice, Chunk, Result
from tandem.terminal import HINT, ServerGoneError, Terminal

Script = Callable[[list[Any]], Iterator[str]]


class ScriptedStream:
    def __init__(self, words: Iterator[str]) -> None:
        self._words = words
        self._said = ""
        self.result: Result | None = None
        self.closed = 0

    def __iter__(self) -> Iterator[Chunk]:
        for word in self._words:
            self._said += word
            yield Chunk(0, word, [1], None, None)
        choice = Choice(0, self._said, [1], None, "stop")
        self.result = Result([choice], [1], None, 1, Usage(3, 2, 5), Timings(0.0, 0.5, 1.5))

    def close(self) -> None:
        self.closed += 1


class ScriptedClient:
    """Answers each request by the next script."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.asked: list[list[tuple[str, str]]] = []
        self.parameters: list[dict[str, Any]] = []
        self.streams: list[ScriptedStream] = []

    def stream_chat(self, messages: Any, **parameters: Any) -> ScriptedStream:
        self.asked.append([(m.role, m.content) for m in messages])
        self.parameters.append(parameters)
        self.streams.append(ScriptedStream(self.scripts.pop(0)(messages)))
        return self.streams[-1]

    def stats(self) -> Stats:
        return Stats("1", 60.0, 1, 2, 3, 4, 5, 6, 70, 80, 90, 100, 64, 32, 16, 1, 12.5)


def says(*words: str) -> Script:
    return lambda _messages: iter(words)


def raises(error: BaseException, *words: str) -> Script:
    def script(_messages: list[Any]) -> Iterator[str]:
        yield from words
        raise error

    return script


def make(*scripts: Script, terminal: bool = True) -> tuple[Repl, ScriptedClient, io.StringIO]:
    client, shown = ScriptedClient(*scripts), io.StringIO()
    screen = Screen(shown, shown, terminal=terminal, colour=False)
    return Repl(client, "model", Conversation(Settings()), screen), client, shown


def test_the_conversation_goes_along() -> None:
    repl, client, shown = make(says("Hel", "lo"), says("Bye"))
    assert repl.take("hi")
    assert repl.take("and?")
    assert client.asked[1] == [("user", "hi"), ("assistant", "Hello"), ("user", "and?")]
    assert shown.getvalue() == "Hello\nBye\n"
    assert all(stream.closed for stream in client.streams)


def test_only_what_was_set_is_sent() -> None:
    repl, client, _ = make(says("a"), says("b"))
    repl.take("x")
    repl.take("/set temperature 0")
    repl.take("/set max_tokens=4")
    repl.take("y")
    assert client.parameters == [{}, {"temperature": 0.0, "max_tokens": 4}]


def test_ctrl_c_stops_the_answer_and_keeps_what_came() -> None:
    repl, client, shown = make(raises(KeyboardInterrupt(), "half an "), says("more"))
    assert repl.take("x")
    assert client.streams[0].closed
    assert shown.getvalue() == "half an \n(stopped)\n"
    repl.take("y")
    assert client.asked[1] == [("user", "x"), ("assistant", "half an "), ("user", "y")]


def test_ctrl_c_before_the_first_word_takes_the_question_back() -> None:
    repl, client, _ = make(raises(KeyboardInterrupt()), says("more"))
    repl.take("x")
    repl.take("y")
    assert client.asked[1] == [("user", "y")]


def test_without_a_terminal_ctrl_c_is_the_programs() -> None:
    repl, _, _ = make(raises(KeyboardInterrupt(), "half"), terminal=False)
    with pytest.raises(KeyboardInterrupt):
        repl.take("x")


def test_a_refusal_is_shown_and_the_talk_goes_on() -> None:
    repl, client, shown = make(raises(QueueFullError("the queue is full")), says("ok"))
    assert not repl.take("x")
    assert "the queue is full" in shown.getvalue()
    assert repl.take("y")
    assert client.asked[1] == [("user", "y")]


def test_a_lost_server_ends_the_talk() -> None:
    repl, client, _ = make(raises(InstanceFailedError("rank 1 died"), "so"))
    with pytest.raises(InstanceFailedError, match="rank 1"):
        repl.take("x")
    assert client.streams[0].closed


def test_regenerate_draws_the_last_answer_again() -> None:
    repl, client, _ = make(says("a"), says("b"), says("c"))
    repl.take("one")
    repl.take("/set seed 5")
    repl.take("/regenerate")
    repl.take("/regenerate")
    assert client.asked == [[("user", "one")]] * 3
    assert [p.get("seed") for p in client.parameters] == [None, 6, 7]
    assert [m.content for m in repl.conversation.turns] == ["one", "c"]


@pytest.mark.parametrize("error", [QueueFullError("full"), KeyboardInterrupt()])
def test_a_failed_regenerate_keeps_the_old_answer(error: BaseException) -> None:
    repl, _, _ = make(says("old"), raises(error))
    repl.take("one")
    repl.take("/regenerate")
    assert [m.content for m in repl.conversation.turns] == ["one", "old"]


def test_regenerate_without_an_answer_is_refused() -> None:
    repl, _, shown = make()
    assert not repl.take("/regenerate")
    assert "no answer" in shown.getvalue()


def test_system_set_shown_removed() -> None:
    repl, client, shown = make(says("a"), says("b"))
    for line in ("/system", "/system talk like a sailor", "/system", "x", "/system -", "y"):
        assert repl.take(line)
    assert client.asked[0][0] == ("system", "talk like a sailor")
    assert client.asked[1][0] == ("user", "x")
    assert "no system prompt" in shown.getvalue()
    assert "\ntalk like a sailor\n" in shown.getvalue()


def test_clear_forgets() -> None:
    repl, client, _ = make(says("a"), says("b"))
    for line in ("x", "/clear", "y"):
        repl.take(line)
    assert client.asked[1] == [("user", "y")]


def test_help_names_every_command_and_set_every_key() -> None:
    repl, _, shown = make()
    repl.take("/help")
    repl.take("/set")
    text = shown.getvalue()
    assert all(f"/{name}" in text for name in COMMANDS)
    assert "max_tokens" in text
    assert "temperature" in text


def test_stats_tell_the_last_answer_and_the_server() -> None:
    repl, _, shown = make(says("a"))
    repl.take("/stats")
    assert "last answer" not in shown.getvalue()
    repl.take("x")
    repl.take("/stats")
    assert (
        "last answer  5 tokens, 4.0 tokens/s, first after 0.50 s, prompt 3 (2 cached)" in shown.getvalue()
    )
    assert "16 used, 16 cached, 32 free of 64" in shown.getvalue()


def test_save_asks_for_a_name_and_replaces_only_its_own(tmp_path: Path) -> None:
    repl, _, shown = make(says("first"), says("second"))
    assert not repl.take("/save")
    (tmp_path / "mine.md").write_text("mine")
    assert not repl.take(f"/save {tmp_path}/mine.md")
    assert (tmp_path / "mine.md").read_text() == "mine"
    repl.take("x")
    assert repl.take(f"/save {tmp_path}/talk.md")
    repl.take("y")
    assert repl.take(f"/save {tmp_path}/talk.md")
    assert "second" in (tmp_path / "talk.md").read_text()
    assert f"saved to {tmp_path}/talk.md" in shown.getvalue()


def test_an_unknown_command_is_not_sent_and_two_slashes_are() -> None:
    repl, client, shown = make(says("a"))
    assert not repl.take("/nope")
    assert "/nope" in shown.getvalue()
    assert client.asked == []
    repl.take("//etc/passwd")
    assert client.asked == [[("user", "/etc/passwd")]]


def test_lines_from_a_pipe() -> None:
    repl, client, shown = make(says("a"), says(), says("b\n"), terminal=False)
    assert not repl.run_lines([b"one\r\n", b"\n", b"\xff\n", b"two\n", b"three", b"/quit\n", b"never\n"])
    assert client.asked[1] == [("user", "one"), ("assistant", "a"), ("user", "two")]
    assert "line 3 is not UTF-8" in shown.getvalue()
    answers = [line for line in shown.getvalue().split("\n") if line in ("a", "b", "")]
    assert answers == ["a", "", "b", ""]


def test_a_model_that_cannot_chat_says_what_it_can() -> None:
    check_can_chat(True, True, "m")
    with pytest.raises(InvalidRequestError, match="--raw"):
        check_can_chat(True, False, "m")
    with pytest.raises(InvalidRequestError, match="--prompt-ids"):
        check_can_chat(False, False, "m")


def type_keys(keys: str, *scripts: Script, pidfd: int | None = None, history: Path | None = None) -> Any:
    """Type ``keys`` at a terminal until it ends; return what was asked and what was shown."""
    repl, client, shown = make(*scripts)
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        terminal = Terminal(history, repl, pidfd, given_input=pipe, given_output=DummyOutput())
        terminal.run()
    return [asked[-1][1] for asked in client.asked], shown.getvalue()


CTRL_C, CTRL_D, ALT_ENTER = "\x03", "\x04", "\x1b\r"


def test_enter_sends_and_ctrl_d_leaves() -> None:
    asked, shown = type_keys(f"hello\rworld\r{CTRL_D}", says("a"), says("b"))
    assert asked == ["hello", "world"]
    assert "a\n" in shown


@pytest.mark.parametrize("new_line", [ALT_ENTER, "\\\r"])
def test_a_message_of_several_lines(new_line: str) -> None:
    asked, _ = type_keys(f"one{new_line}two\r{CTRL_D}", says("a"))
    assert asked == ["one\ntwo"]


def test_a_paste_is_one_message() -> None:
    asked, _ = type_keys(f"\x1b[200~one\ntwo\nthree\x1b[201~\r{CTRL_D}", says("a"))
    assert asked == ["one\ntwo\nthree"]


def test_ctrl_c_clears_a_line_and_at_an_empty_one_tells_how_to_leave() -> None:
    asked, shown = type_keys(f"never{CTRL_C}{CTRL_C}x\r/quit\r", says("a"))
    assert asked == ["x"]
    assert shown.count(HINT) == 1


def test_history_is_kept_and_the_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history"
    type_keys(f"first\r{CTRL_D}", says("a"), history=path)
    assert path.stat().st_mode & 0o777 == 0o600
    asked, _ = type_keys(f"\x1b[A\r{CTRL_D}", says("a"), history=path)
    assert asked == ["first"]


def test_without_a_place_for_it_history_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    asked, shown = type_keys(f"x\r{CTRL_D}", says("a"), history=tmp_path / "file" / "history")
    assert asked == ["x"]
    assert "not kept" in shown


def test_the_servers_end_ends_the_prompt() -> None:
    read_end, write_end = os.pipe()
    os.close(write_end)
    try:
        with pytest.raises(ServerGoneError):
            type_keys("typing", pidfd=read_end)
    finally:
        os.close(read_end)


def test_leaving_is_no_error_of_tandem() -> None:
    assert not issubclass(LeaveError, TandemError)
