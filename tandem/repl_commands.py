"""The REPL's slash commands. Each takes the REPL and what stands after its name."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from protocol.errors import InvalidRequestError, StorageError
from tandem.conversation import SETTABLE

if TYPE_CHECKING:
    from tandem.repl import Repl


class Command(NamedTuple):
    """One slash command."""

    run: "Callable[[Repl, str], None]"
    usage: str
    meaning: str


class LeaveError(Exception):
    """The user wants to leave; not an error of the program."""


def run_command(repl: "Repl", line: str) -> None:
    """Carry out a line that starts with a slash.

    Errors: ``InvalidRequestError`` for an unknown command; what the command raises; ``LeaveError``.
    """
    name, _, argument = line[1:].strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise InvalidRequestError(
            f"there is no command /{name}; /help lists them ('//' starts a message with a slash)"
        )
    command.run(repl, argument.strip())


def _help(repl: "Repl", _argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:<{width}}  {command.meaning}" for command in COMMANDS.values()]
    if repl.screen.terminal:
        lines += [
            f"{keys:<{width}}  {meaning}"
            for keys, meaning in (
                ("Alt-Enter, \\ Enter", "a new line in the message; pasted lines stay together"),
                ("Ctrl-C", "stop the answer"),
                ("Ctrl-D", "leave"),
            )
        ]
    repl.screen.note("\n".join(lines))


def _system(repl: "Repl", text: str) -> None:
    if text == "-":
        repl.conversation.system = None
        repl.screen.note("system prompt removed")
    elif text:
        repl.conversation.system = text
        repl.screen.note("system prompt set")
    else:
        repl.screen.note(repl.conversation.system or "no system prompt is set")


def _set(repl: "Repl", argument: str) -> None:
    settings = repl.conversation.settings
    key, _, text = argument.replace("=", " ", 1).partition(" ")
    if not key:
        width = max(map(len, SETTABLE))
        lines = [f"{key:<{width}}  {_shown(settings.value(key))}" for key in SETTABLE]
        repl.screen.note("\n".join(lines))
        return
    if text.strip():
        settings = repl.conversation.settings = settings.with_text(key, text.strip())
    elif key not in SETTABLE:
        raise InvalidRequestError(f"{key!r} cannot be set; {', '.join(SETTABLE)} can", field=key)
    repl.screen.note(f"{key} = {_shown(settings.value(key))}")


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)


def _save(repl: "Repl", name: str) -> None:
    if not name:
        raise InvalidRequestError("say where: /save FILE (.json for JSON, else Markdown)")
    try:
        path = Path(name).expanduser().absolute()
    except RuntimeError as error:
        raise StorageError(f"{name}: {error}") from None
    repl.conversation.save(path, repl.model, replace=path in repl.saved)
    repl.saved.add(path)
    repl.screen.note(f"saved to {path}")


def _regenerate(repl: "Repl", _argument: str) -> None:
    conversation = repl.conversation
    before = list(conversation.turns)
    conversation.ask_again()
    try:
        repl.answer()
    finally:
        if len(conversation.turns) < len(before):
            conversation.turns[:] = before  # Refused, or stopped at once: the old answer stays.


def _stats(repl: "Repl", _argument: str) -> None:
    stats = repl.client.stats()
    used = stats.blocks_total - stats.blocks_free - stats.blocks_cached
    lines = [
        f"server       up {stats.uptime_s:.0f} s, {stats.running} running, {stats.waiting} waiting, "
        f"{stats.finished} finished, {stats.cancelled} cancelled, {stats.failed} failed",
        f"tokens       {stats.prompt_tokens} of prompts ({stats.cached_tokens} from the prefix cache), "
        f"{stats.completion_tokens} of answers",
        f"kv blocks    {used} used, {stats.blocks_cached} cached, {stats.blocks_free} free "
        f"of {stats.blocks_total}",
        f"steps        {stats.steps}, {stats.step_ms:.1f} ms each, {stats.preemptions} preemptions",
    ]
    if repl.last is not None:
        usage, times = repl.last.usage, repl.last.timings
        decode_s = times.total_s - times.first_token_s
        speed = f", {(usage.completion_tokens - 1) / decode_s:.1f} tokens/s" if decode_s > 0 else ""
        lines.insert(
            0,
            f"last answer  {usage.completion_tokens} tokens{speed}, first after "
            f"{times.first_token_s:.2f} s, prompt {usage.prompt_tokens} ({usage.cached_tokens} cached)",
        )
    repl.screen.note("\n".join(lines))


def _clear(repl: "Repl", _argument: str) -> None:
    repl.conversation.clear()
    repl.screen.note("conversation forgotten")


def _quit(_repl: "Repl", _argument: str) -> None:
    raise LeaveError


COMMANDS: Final = {
    "help": Command(_help, "/help", "this list"),
    "system": Command(_system, "/system [TEXT|-]", "show, set or remove the system prompt"),
    "set": Command(_set, "/set [KEY [VALUE]]", "show or change how answers are drawn; 'default' puts back"),
    "regenerate": Command(_regenerate, "/regenerate", "draw the last answer again"),
    "clear": Command(_clear, "/clear", "forget the conversation; the system prompt stays"),
    "save": Command(_save, "/save FILE", "write the conversation (.json, else Markdown)"),
    "stats": Command(_stats, "/stats", "the last answer and the server in numbers"),
    "quit": Command(_quit, "/quit", "leave"),
}
