"""Stop strings, found while the text is still arriving."""

from collections.abc import Sequence


class StopStrings:
    """Withholds text that may be the start of a stop string; never gives out a part of one.

    Where several match, the one that is complete first counts, and of those the one that starts first:
    so the result does not depend on how the text is cut into pieces. Owned by one choice of one request.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._prefixes = frozenset(stop[:end] for stop in stops for end in range(1, len(stop)))
        self._longest = max(map(len, stops)) - 1
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that is safe to show, and whether a stop string is complete."""
        text = self._held + text
        self._held = ""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            return text[: min(found)[1]], True
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[-size:] in self._prefixes:
                self._held = text[-size:]
                return text[:-size], False
        return text, False

    def flush(self) -> str:
        """Return what was withheld: the answer is over, nothing can complete it."""
        held, self._held = self._held, ""
        return held
