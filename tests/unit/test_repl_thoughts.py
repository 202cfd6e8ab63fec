"""What a model thinks, on a terminal, in a pipe and in the conversation."""

import io

from protocol.chat import ChatMessage
from tandem.conversation import Conversation, Settings
from tandem.render import Screen
from tandem.results import Chunk


def shown(*chunks: tuple[str, str], terminal: bool, colour: bool = False) -> str:
    out = io.StringIO()
    screen = Screen(out, out, terminal=terminal, colour=colour)
    for reasoning, text in chunks:
        screen.part(Chunk(0, text, [1], None, None, reasoning))
    return out.getvalue()


def test_thoughts_are_dim_on_a_terminal_and_not_in_a_pipe() -> None:
    chunks = (("I think", ""), (" so.\n", ""), ("", "\n\nYes"), ("", "."))
    assert shown(*chunks, terminal=True, colour=True) == "\x1b[2mI think\x1b[0m\x1b[2m so.\n\x1b[0m\nYes."
    assert shown(*chunks, terminal=True) == "I think so.\n\nYes."
    assert shown(*chunks, terminal=False) == "\n\nYes."
    assert shown(("a\x1b[2Jb", ""), terminal=True) == "a[2Jb"


def test_an_answer_that_only_thought_is_kept() -> None:
    conversation = Conversation(Settings())
    conversation.ask("why")
    conversation.answer("", "because")
    assert conversation.turns[-1] == ChatMessage("assistant", "", reasoning_content="because")
    conversation.ask("and")
    conversation.answer("", "")
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"]
    assert "**assistant**" in conversation._as_markdown("m")
