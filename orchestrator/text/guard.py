"""Keeps what users say from becoming tokens that only the template may place.

A name such as ``<|im_end|>`` in a message is cut inside before the template sees it, and the rendered text
is tokenised in pieces at those cuts: so no piece holds the name, and it is tokenised as the words it is.
A text without such names is tokenised whole, as if this were not here.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from protocol.errors import InvalidRequestError

_CUTS: Final = range(0x10000, 0x1000C)
"""Letters of Linear B: printable, so that templates that write Python's or JSON's form keep them."""


class Guard:
    """The guard of one rendering."""

    def __init__(self, template: str, said: Any) -> None:
        """``said`` is all that is to be rendered.

        Errors: ``InvalidRequestError`` where no character is left to cut by.
        """
        used = template + "".join(_strings(said))
        self._cut = next((chr(c) for c in _CUTS if chr(c) not in used), "")
        if not self._cut:
            raise InvalidRequestError("the messages use all letters reserved for cutting", field="messages")

    def guard(self, said: Any, names: re.Pattern[str]) -> Any:
        """Return the same data, every name in its strings cut inside; ``names`` is a ``name_pattern``."""
        match said:
            case str():
                return names.sub(lambda first: first[0] + self._cut, said)
            case list():
                return [self.guard(item, names) for item in said]
            case dict():
                return {self.guard(k, names): self.guard(v, names) for k, v in said.items()}
            case _:
                return said

    def pieces(self, rendered: str) -> list[str]:
        """Return the rendered text in pieces to be tokenised apart; together they are what was said."""
        return rendered.split(self._cut)


def name_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Return what finds the first character of each name, of those too that begin inside another one."""
    found = "|".join(re.escape(name) for name in names if len(name) > 1)
    return re.compile(f"(?=(?:{found})).", re.DOTALL) if found else re.compile(r"(?!)")


def _strings(said: Any) -> Iterator[str]:
    match said:
        case str():
            yield said
        case list():
            for item in said:
                yield from _strings(item)
        case dict():
            for key, value in said.items():
                yield from _strings(key)
                yield from _strings(value)
