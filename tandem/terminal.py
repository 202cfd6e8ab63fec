"""The REPL on a terminal: a prompt with history, several lines, and an eye on the server."""

import asyncio
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition, completion_is_selected
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import ColorDepth, Output
from prompt_toolkit.styles import Style

from protocol.errors import StorageError
from tandem.repl import Repl, make_history
from tandem.repl_commands import COMMANDS, LeaveError

HINT = "(Ctrl-D or /quit leaves, /help lists the commands)"


class ServerGoneError(Exception):
    """The server's process ended while the user was typing."""


class Terminal:
    """Reads messages from a terminal. Owns the prompt session.

    ``server_pidfd`` becomes readable when the server ends; None: it is noticed at the next message.
    """

    def __init__(
        self,
        history_path: Path | None,
        repl: Repl,
        server_pidfd: int | None,
        *,
        given_input: Input | None = None,
        given_output: Output | None = None,
    ) -> None:
        self._repl = repl
        self._server_pidfd = server_pidfd
        colour = repl.screen.colour
        self._session: PromptSession[str] = PromptSession(
            [("class:prompt", "> ")],
            multiline=True,
            prompt_continuation="  ",
            history=self._history(history_path),
            key_bindings=_bindings(),
            completer=WordCompleter([f"/{name}" for name in COMMANDS], sentence=True),
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
            reserve_space_for_menu=0,
            style=Style([("prompt", "bold ansicyan" if colour else "")]),
            color_depth=None if colour else ColorDepth.MONOCHROME,
            input=given_input,
            output=given_output,
        )

    def run(self) -> None:
        """Talk until the user leaves.

        Errors: ``ServerGoneError``; those of ``Repl.take`` but leaving.
        """
        while True:
            try:
                self._repl.screen.gap()
                text = self._session.prompt(pre_run=self._watch_server)
                self._repl.take(text)
            except KeyboardInterrupt:
                self._repl.screen.note(HINT)
            except (EOFError, LeaveError):
                return

    def _history(self, path: Path | None) -> History:
        if path is None:
            return InMemoryHistory()
        try:
            make_history(path)
        except StorageError as error:
            self._repl.screen.note(error.message)
            return InMemoryHistory()
        return FileHistory(str(path))

    def _watch_server(self) -> None:
        if self._server_pidfd is None:
            return
        fd, app, loop = self._server_pidfd, get_app(), asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(fd)
            if not app.is_done:
                app.exit(exception=ServerGoneError())

        loop.add_reader(fd, gone)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter", filter=~completion_is_selected)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

    return bindings
