"""How evenly tokens choose a model's experts, from what its ranks count."""

from protocol.client import ExpertBalance
from protocol.control import ExpertLoad


class ExpertTotals:
    """Owner of the newest counts of every rank of one epoch."""

    def __init__(self) -> None:
        self._layers: dict[int, dict[int, list[int]]] = {}
        """By layer, and by the first expert of a rank's; ranks that place experts have different ones."""

    def take(self, load: ExpertLoad) -> None:
        """Put a rank's counts in the place of its earlier ones."""
        for one in load.layers:
            self._layers.setdefault(one.layer, {})[one.first] = one.tokens

    def balance(self) -> list[ExpertBalance]:
        """Return every layer's balance, in order; nothing without experts, or before the first report.

        Layers of ranks that have not reported yet are counted as far as known.
        """
        found = []
        for layer, parts in sorted(self._layers.items()):
            tokens = [count for _, counts in sorted(parts.items()) for count in counts]
            total = sum(tokens)
            imbalance = max(tokens) * len(tokens) / total if total else 1.0
            busiest = max(range(len(tokens)), key=tokens.__getitem__)
            found.append(ExpertBalance(layer, total, round(imbalance, 4), busiest))
        return found
