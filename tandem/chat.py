"""``tandem chat``: a conversation with one server, on a terminal or from a pipe."""

from collections.abc import Iterable
from pathlib import Path

from protocol.chat import ChatMessage
from protocol.errors import InstanceFailedError
from protocol.sampling import SamplingParams
from tandem.client import Client
from tandem.conversation import Conversation, Settings
from tandem.render import Screen
from tandem.repl import Repl, check_can_chat

CHAT_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95)
"""Steadier than the model's own distribution, which small models ramble from; ``/set`` changes it."""


def open_repl(client: Client, screen: Screen, temperature: float | None = None) -> Repl:
    """Return the REPL of a new conversation; ``temperature`` None is the chat's default.

    Errors: ``InvalidRequestError`` for a model that holds none; those of the server.
    """
    info = client.info()
    check_can_chat(info.has_tokenizer, info.has_chat_template, info.model)
    if screen.terminal:
        screen.note(f"{info.model} · {info.layout} · {info.dtype} · context {info.context}")
    settings = Settings(CHAT_SAMPLING)
    if temperature is not None:
        settings = settings.with_text("temperature", str(temperature))
    return Repl(client, info.model, Conversation(settings), screen)


def talk_on_terminal(repl: Repl, history: Path, server_pidfd: int) -> None:
    """Talk until the user leaves. Errors: those of a server that is gone."""
    from tandem.terminal import ServerGoneError, Terminal

    repl.screen.note("/help lists the commands, Ctrl-D leaves")
    try:
        Terminal(history, repl, server_pidfd).run()
    except ServerGoneError:
        raise InstanceFailedError(f"the server of {repl.model} has ended, and the chat with it") from None


def answer_lines(repl: Repl, lines: Iterable[bytes]) -> tuple[list[ChatMessage], bool]:
    """Answer each line in turn; return the conversation and whether all lines could be answered."""
    done = repl.run_lines(lines)
    return repl.conversation.messages(), done
