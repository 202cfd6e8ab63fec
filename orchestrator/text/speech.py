"""How one model's answers are read: its form of tool calls, its thinking, and marks that are tokens."""

import secrets
from dataclasses import dataclass
from typing import Self

from orchestrator.text.detokenizer import Detokenizer, DetokenizerFactory, NoText
from orchestrator.text.parsers import Parser, ToolFormat, find_format
from orchestrator.text.vocabulary import Vocabulary

_FIRST_MARK = 0xD800
"""Halves of surrogate pairs: no text that is decoded from bytes has one."""
_THINKING = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Speech:
    """Made once for a model; shared by all answers."""

    tools: ToolFormat | None
    """None: its calls are not in a form known here."""
    thinks: bool
    shown: dict[str, str]
    """By the name of a mark that is a special token, the character that stands for it in the text."""
    factory: DetokenizerFactory | None
    """Gives text with these characters."""

    @classmethod
    def of(cls, template: str, vocabulary: Vocabulary | None, factory: DetokenizerFactory | None) -> Self:
        """Find out from the chat template and the vocabulary."""
        if vocabulary is None or factory is None:
            return cls(None, False, {}, None)
        tools, thinks = find_format(template, vocabulary.added_tokens)
        names = list(_THINKING) if thinks else []
        if tools is not None:
            names += [tools.open, tools.close, *tools.inside]
        special = set(vocabulary.special_tokens)
        shown, of_token = {}, {}
        for at, name in enumerate(name for name in names if name in special):
            token_id = vocabulary.token_id(name)
            if token_id is not None:
                shown[name] = of_token[token_id] = chr(_FIRST_MARK + at)
        return cls(tools, thinks, shown, factory.marked(of_token) if of_token else factory)

    def parser(self, *, calls: bool, is_thinking: bool) -> Parser | None:
        """Return what reads one answer; None where all of it is text.

        ``calls``: whether tools may be called. ``is_thinking``: the prompt ends in an open ``<think>``.
        """
        tools = self.tools if calls else None
        if tools is None and not self.thinks and not is_thinking:
            return None
        return Parser(
            tools,
            thinks=self.thinks,
            is_thinking=is_thinking,
            make_id=lambda _index: f"call_{secrets.token_hex(12)}",
            shown=self.shown,
        )

    def detokenizer(self) -> Detokenizer:
        """Return a detokenizer whose text such a parser reads."""
        return NoText() if self.factory is None else self.factory.make()
