"""A measured figure beside what it is held against."""

from collections.abc import Mapping, Sequence

import msgspec


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What a figure is held against, in its unit; None where nothing is known."""

    ceiling: float | None = None
    """What the machine allows."""
    must: float | None = None
    aim: float | None = None
    vllm: float | None = None
    sglang: float | None = None


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a report."""

    name: str
    value: float
    unit: str
    higher_is_better: bool = False
    samples: list[float] = []
    """The repeats whose median ``value`` is."""
    demand: Demand = Demand()

    @property
    def ratio(self) -> float | None:
        """What part of the ceiling is reached; 1 is all of it."""
        ceiling = self.demand.ceiling
        if ceiling is None or not ceiling or not self.value:
            return None
        return self.value / ceiling if self.higher_is_better else ceiling / self.value

    @property
    def verdict(self) -> str:
        """``aim``, ``must`` or ``missed``: the most that is met; empty where nothing is demanded."""
        must, aim = self.demand.must, self.demand.aim
        if aim is not None and self._meets(aim):
            return "aim"
        if must is None:
            return ""
        return "must" if self._meets(must) else "missed"

    def _meets(self, limit: float) -> bool:
        return self.value >= limit if self.higher_is_better else self.value <= limit


def table(figures: Sequence[Figure]) -> str:
    """Return the figures for people."""
    head = ("", "measured", "unit", "ceiling", "reached", "must", "aim", "vLLM", "SGLang", "met")
    rows: list[tuple[str, ...]] = [head]
    for figure in figures:
        demand = figure.demand
        limits = (demand.must, demand.aim, demand.vllm, demand.sglang)
        rows.append(
            (
                figure.name,
                _number(figure.value),
                figure.unit,
                _number(demand.ceiling),
                "" if figure.ratio is None else f"{figure.ratio:.2f}",
                *map(_number, limits),
                figure.verdict,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place in (0, 2) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def as_data(figures: Sequence[Figure], facts: Mapping[str, object]) -> bytes:
    """Return the report as JSON: the facts of the run, and each figure with ratio and verdict."""
    listed = [msgspec.to_builtins(f) | {"ratio": f.ratio, "verdict": f.verdict} for f in figures]
    return msgspec.json.format(msgspec.json.encode({**facts, "figures": listed}), indent=1) + b"\n"


def missed(figures: Sequence[Figure]) -> list[str]:
    """Return the demands that are not met, in words."""
    return [
        f"{f.name}: {_number(f.value)} {f.unit}, must be {_number(f.demand.must)}"
        for f in figures
        if f.verdict == "missed"
    ]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
