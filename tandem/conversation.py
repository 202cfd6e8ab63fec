"""What a conversation is: the messages so far, the system prompt, and how answers are drawn."""

import re
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.chat import ChatMessage
from protocol.client import Generate
from protocol.errors import InvalidRequestError, StorageError
from protocol.sampling import SamplingParams

SETTABLE: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""What ``/set`` knows, in the order in which it is shown."""
_DEFAULT: Final = ("default", "none")
_PATH = re.compile(r" - at `[^`]*`$")


class Settings(msgspec.Struct, frozen=True):
    """How answers are drawn."""

    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None

    def value(self, key: str) -> Any:
        """Return one of ``SETTABLE``."""
        return self.max_tokens if key == "max_tokens" else getattr(self.sampling, key)

    def with_text(self, key: str, text: str) -> "Settings":
        """Return these settings with one of them read from text; ``default`` puts it back.

        Errors: ``InvalidRequestError`` naming the key.
        """
        if key not in SETTABLE:
            raise InvalidRequestError(f"{key!r} cannot be set; {', '.join(SETTABLE)} can", field=key)
        kind: Any = Generate if key == "max_tokens" else SamplingParams
        given = {} if text in _DEFAULT else {key: text}
        needed = {"id": "settings", "prompt": ""} if kind is Generate else {}
        try:
            value = getattr(msgspec.convert(given | needed, kind, strict=False), key)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(
                f"{key} = {text!r} does not do: {_PATH.sub('', str(error))}", field=key
            ) from None
        if key == "max_tokens":
            return msgspec.structs.replace(self, max_tokens=value)
        return msgspec.structs.replace(
            self, sampling=msgspec.structs.replace(self.sampling, **{key: value})
        )


class Conversation:
    """The turns so far. Its one writer is the REPL that it belongs to."""

    def __init__(self, settings: Settings, system: str | None = None) -> None:
        self.settings = settings
        self.system = system
        self.turns: list[ChatMessage] = []
        self._again = 0

    def messages(self) -> list[ChatMessage]:
        """Return what is sent: the system prompt, where there is one, and the turns."""
        head = [ChatMessage("system", self.system)] if self.system is not None else []
        return head + self.turns

    def sampling(self) -> SamplingParams:
        """Return the parameters of the next draw; drawn again, a set seed is counted up."""
        seed = self.settings.sampling.seed
        if seed is None or not self._again:
            return self.settings.sampling
        return msgspec.structs.replace(self.settings.sampling, seed=(seed + self._again) % 2**63)

    def ask(self, text: str) -> None:
        """Add what the user says."""
        self.turns.append(ChatMessage("user", text))
        self._again = 0

    def answer(self, text: str, reasoning: str = "") -> None:
        """Add the model's answer. An empty one takes the question back, so that turns stay in pairs."""
        if text or reasoning:
            self.turns.append(ChatMessage("assistant", text, reasoning_content=reasoning or None))
        else:
            self.take_back()

    def take_back(self) -> None:
        """Remove a question that got no answer."""
        assert self.turns[-1].role == "user"
        self.turns.pop()

    def ask_again(self) -> None:
        """Forget the last answer, so that its question is the last turn.

        Errors: ``InvalidRequestError`` where there is none.
        """
        if not self.turns:
            raise InvalidRequestError("there is no answer to draw again yet")
        assert self.turns[-1].role == "assistant"
        self.turns.pop()
        self._again += 1

    def clear(self) -> None:
        """Forget all turns; the system prompt and the settings stay."""
        self.turns.clear()
        self._again = 0

    def save(self, path: Path, model: str, *, replace: bool) -> None:
        """Write the conversation: JSON where the name ends in ``.json``, else Markdown.

        Errors: ``StorageError`` where it cannot be written, or is there and ``replace`` is false.
        """
        content = self._as_json(model) if path.suffix == ".json" else self._as_markdown(model)
        try:
            with path.open("w" if replace else "x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            raise StorageError(f"{path} is there already: choose another name") from None
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from None

    def _as_json(self, model: str) -> str:
        settings = {key: self.settings.value(key) for key in SETTABLE}
        saved = {"model": model, "settings": settings, "messages": self.messages()}
        return msgspec.json.format(msgspec.json.encode(saved)).decode() + "\n"

    def _as_markdown(self, model: str) -> str:
        parts = [f"# Conversation with {model}"]
        parts += [f"**{message.role}**\n\n{(message.content or '').strip()}" for message in self.messages()]
        return "\n\n".join(parts) + "\n"
