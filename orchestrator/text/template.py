"""A model directory's chat template, rendered by the conventions that published templates are written for.

Those are ``apply_chat_template``'s of huggingface/transformers: the names a template sees, trimmed blocks,
``raise_exception``, ``strftime_now`` and ``tojson``. Runs in a text helper only: the sandbox keeps a
template from our objects but bounds neither its time nor its memory.
"""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from protocol.errors import InvalidRequestError, ModelFormatError

MAX_CONFIG_BYTES = 16 << 20
_ASKS_IS_STRING = re.compile(r"arguments\s+is\s+(?:not\s+)?(?:string|mapping)")


class TemplateSource:
    """The text of a template and the special tokens it may name. ``text`` is None where there is none."""

    def __init__(self, directory: Path) -> None:
        config = read_json(directory / "tokenizer_config.json")
        self.special_tokens = {
            name: found
            for name, value in config.items()
            if name.endswith("_token") and (found := _content(value)) is not None
        }
        self.text = _template(directory, config)


def read_json(path: Path) -> dict[str, Any]:
    """Return a small JSON object of a model directory; empty where the file is missing.

    Errors: ``ModelFormatError`` for one that is too large or malformed.
    """
    try:
        with path.open("rb") as file:
            found = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror}", field=path.name) from None
    if len(found) > MAX_CONFIG_BYTES:
        raise ModelFormatError(f"{path} has more than {MAX_CONFIG_BYTES} bytes", field=path.name)
    try:
        config = json.loads(found)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is not JSON: {error}", field=path.name) from None
    if not isinstance(config, dict):
        raise ModelFormatError(f"{path} holds a {type(config).__name__}, not an object", field=path.name)
    return config


def _content(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    try:
        with path.open("rb") as file:
            found = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror}", field=path.name) from None
    else:
        if len(found) > MAX_CONFIG_BYTES:
            raise ModelFormatError(f"{path} has more than {MAX_CONFIG_BYTES} bytes", field=path.name)
        try:
            return found.decode()
        except UnicodeDecodeError as error:
            raise ModelFormatError(f"{path} is not UTF-8: {error}", field=path.name) from None
    named = config.get("chat_template")
    if isinstance(named, list):
        # Several templates by name; the one for plain conversations is "default".
        named = next(
            (t.get("template") for t in named if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return named if isinstance(named, str) else None


def takes_tools(text: str) -> bool:
    """Whether a template's text has a place for tools."""
    return "tools" in text


def wants_text_of_arguments(text: str) -> bool:
    """Whether a template takes a call's arguments as JSON text where they are text, instead of as data."""
    return _ASKS_IS_STRING.search(text) is not None


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; for us its body is plain output."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: TemplateSource) -> None:
        self._special_tokens = source.special_tokens
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source.text or "")
        except (jinja2.TemplateError, RecursionError) as error:
            raise InvalidRequestError(
                f"the model's chat template does not compile: {error}", field="messages"
            ) from None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Return the conversation up to where the assistant speaks.

        Errors: ``InvalidRequestError`` naming ``messages``, with what the template said.
        """
        # One dictionary: a variable may have any name, that of a parameter too.
        given = (variables or {}) | self._special_tokens
        given |= {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return self._template.render(given)
        except MemoryError:
            raise
        except Exception as error:
            # A template is a program of somebody else's: anything may come out of it.
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from None


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now(UTC).astimezone().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
