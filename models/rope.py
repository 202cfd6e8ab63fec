"""Rotary position embedding as config.json states it: a base, and perhaps a stretching.

Source: transformers' ``modeling_rope_utils`` (names and defaults).
"""

import math
from typing import Any

import msgspec

from protocol.errors import ModelFormatError, UnsupportedModelError


class RopeScaling(msgspec.Struct, frozen=True):
    """Llama 3.1's frequency-dependent stretching, or a linear one where only ``factor`` counts."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def rope_of(rope: dict[str, Any], theta: float | None) -> tuple[float, RopeScaling | None]:
    """Return the base and the stretching of ``rope_parameters`` or ``rope_scaling``.

    ``theta`` is the base that stands beside them, if one does. Errors: ``UnsupportedModelError`` for a
    type that is not known, ``ModelFormatError`` for numbers that cannot be right.
    """
    base = rope.get("rope_theta", theta if theta is not None else 10000.0)
    return _number("rope_theta", base), _scaling(rope)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelFormatError(f"config.json: {name} must be a number, not {value!r}", field=name)
    return float(value)


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UnsupportedModelError(
            f"rope type {kind!r} is not known here: default, linear and llama3 are",
            field="rope_scaling",
        )
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [name for name in names if name not in rope]
    if missing:
        raise ModelFormatError(
            f"config.json: rope type {kind} lacks {', '.join(missing)}", field="rope_scaling"
        )
    numbers = {name: _number(name, rope[name]) for name in names}
    if min(numbers.values()) <= 0 or (
        kind == "llama3" and numbers["low_freq_factor"] > numbers["high_freq_factor"]
    ):
        raise ModelFormatError(
            f"config.json: rope {numbers} must be positive, low not above high", field="rope_scaling"
        )
    if kind == "linear":
        return RopeScaling(kind, numbers["factor"])
    return RopeScaling(
        kind,
        numbers["factor"],
        numbers["low_freq_factor"],
        numbers["high_freq_factor"],
        int(numbers["original_max_position_embeddings"]),
    )
