"""The conversation loop of ``tandem chat``: on a terminal, and line by line from a pipe."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, Unpack, cast

from protocol.client import Stats
from protocol.errors import (
    InvalidRequestError,
    ProtocolError,
    StorageError,
    TandemError,
    UnavailableError,
)
from tandem.conversation import Conversation
from tandem.render import Screen
from tandem.repl_commands import LeaveError, run_command
from tandem.results import Chunk, Messages, Parameters, Result


class ChatStream(Protocol):
    """An answer while it is made. Closing it cancels it."""

    @property
    def result(self) -> Result | None:
        """The whole answer, once it is finished."""

    def __iter__(self) -> Iterator[Chunk]: ...

    def close(self) -> None:
        """End the stream."""


class ChatClient(Protocol):
    """What the REPL needs of ``tandem.Client``."""

    def stream_chat(self, messages: Messages, **parameters: Unpack[Parameters]) -> ChatStream:
        """Return the answer to a conversation."""

    def stats(self) -> Stats:
        """Return the server's numbers."""


class Repl:
    """One conversation with one server. Owns the conversation and what was saved."""

    def __init__(self, client: ChatClient, model: str, conversation: Conversation, screen: Screen) -> None:
        self.client = client
        self.model = model
        self.conversation = conversation
        self.screen = screen
        self.last: Result | None = None
        """The last answer that was not stopped."""
        self.saved: set[Path] = set()
        """Files of this conversation, which ``/save`` may replace."""

    def take(self, text: str) -> bool:
        """Carry out one input: a command or a message. Return whether it was done.

        What is wrong with the input is shown and the conversation goes on.
        Errors: those of a server that is gone (``is_fatal``); ``LeaveError``.
        """
        try:
            if text.startswith("/") and not text.startswith("//"):
                run_command(self, text)
            elif text.strip():
                self.conversation.ask(text.removeprefix("/") if text.startswith("//") else text)
                self.answer()
        except TandemError as error:
            if is_fatal(error):
                raise
            self.screen.error(error.message)
            return False
        return True

    def answer(self) -> None:
        """Stream the answer to the last turn onto the screen. Ctrl-C stops it; what has come is kept.

        Errors: those of the server; the question is then taken back.
        """
        said: list[str] = []
        thought: list[str] = []
        finished = False
        try:
            parameters = _parameters(self.conversation)
            stream = self.client.stream_chat(self.conversation.messages(), **parameters)
            try:
                for chunk in stream:
                    said.append(chunk.text)
                    thought.append(chunk.reasoning)
                    self.screen.part(chunk)
            finally:
                stream.close()
            finished = True
            self.last = stream.result
            self.screen.end_answer("".join(said))
            if self.last is not None and self.last.finish_reason == "length":
                self.screen.note("(the answer reached its limit of tokens)")
            elif not any(said) and not any(thought):
                self.screen.note("(the model said nothing; the question is taken back)")
        except KeyboardInterrupt:
            if not self.screen.terminal:
                raise
            self.screen.note("(stopped)")
        finally:
            # A cut answer is kept for /regenerate and for the model to go on from.
            if finished or any(said) or any(thought):
                self.conversation.answer("".join(said), "".join(thought))
            else:
                self.conversation.take_back()

    def run_lines(self, lines: Iterable[bytes]) -> bool:
        """Answer each line in turn; return whether all could be. Errors: those of ``take`` but leaving."""
        done = True
        try:
            for number, line in enumerate(lines, 1):
                try:
                    text = line.decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    self.screen.error(f"line {number} is not UTF-8: {error.reason} at byte {error.start}")
                    done = False
                    continue
                done &= self.take(text)
        except LeaveError:
            pass
        return done


def is_fatal(error: TandemError) -> bool:
    """Whether there is no server left to talk to."""
    return isinstance(error, (UnavailableError, ProtocolError))


def _parameters(conversation: Conversation) -> Parameters:
    sampling = conversation.sampling()
    given = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
    defaults = type(sampling)()
    found = {name: value for name, value in given.items() if value != getattr(defaults, name)}
    if conversation.settings.max_tokens is not None:
        found["max_tokens"] = conversation.settings.max_tokens
    return cast("Parameters", found)


def check_can_chat(has_tokenizer: bool, has_chat_template: bool, model: str) -> None:
    """Refuse a model that knows no conversations. Errors: ``InvalidRequestError`` saying what it can do."""
    if not has_tokenizer:
        raise InvalidRequestError(
            f"{model} has no tokenizer.json, so it takes token ids only: "
            f"tandem run {model} --prompt-ids 1,2,3",
            field="model",
        )
    if not has_chat_template:
        raise InvalidRequestError(
            f"{model} has no chat template, so it holds no conversations; it can continue a text: "
            f'tandem run {model} --raw "Once upon a time"',
            field="model",
        )


def make_history(path: Path) -> None:
    """Make the file of past inputs, for this user alone. Errors: ``StorageError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        raise StorageError(f"inputs are not kept for the next time: {path}: {error.strerror}") from None
