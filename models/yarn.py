"""YaRN (arXiv:2309.00071): rope stretched by wavelength, as the DeepSeek-V3 family states it.

Formulas: transformers' ``_compute_yarn_parameters`` and ``yarn_apply_mscale``.
"""

import math
from typing import Any

import msgspec

from protocol.errors import ModelFormatError, UnsupportedModelError


class Yarn(msgspec.Struct, frozen=True):
    """The numbers of a ``rope_scaling`` of type yarn."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    """Turns within the original context from which a wave stays as it is."""
    beta_slow: float = 1.0
    """Turns up to which it is stretched by the whole factor; waves between are blended."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @property
    def rotation_scale(self) -> float:
        """What cosines and sines are multiplied with."""
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def softmax_scale(self) -> float:
        """What attention's scores are multiplied with beside 1 / sqrt(dim)."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def blended(self, theta: float, dim: int) -> tuple[float, float]:
        """Return the pairs of a head's ``dim`` features between which waves are blended: (first, last)."""

        def pair(turns: float) -> float:
            wave = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(wave) / (2 * math.log(theta))

        first = max(math.floor(pair(self.beta_fast)), 0)
        last = min(math.ceil(pair(self.beta_slow)), dim - 1)
        return (first, last) if first != last else (first, last + 0.001)

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


_KNOWN = {"type", "rope_type", "rope_theta", *Yarn.__struct_fields__}


def yarn_of(rope: dict[str, Any]) -> Yarn | None:
    """Return the stretching that ``rope_scaling`` or ``rope_parameters`` states, None for none.

    Errors: ``UnsupportedModelError`` for another type or a field that is not known here,
    ``ModelFormatError`` for numbers that cannot be right; both name ``rope_scaling``.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise UnsupportedModelError(
            f"rope type {kind!r} is not known for this architecture: default and yarn are",
            field="rope_scaling",
        )
    unknown = sorted(name for name in rope if name not in _KNOWN and rope[name] is not None)
    if unknown:
        raise UnsupportedModelError(
            f"rope type yarn with {', '.join(unknown)} is not known here: {', '.join(sorted(_KNOWN))} are",
            field="rope_scaling",
        )
    given = {n: rope[n] for n in Yarn.__struct_fields__ if rope.get(n) is not None}
    try:
        found = msgspec.convert(given, Yarn)
    except msgspec.ValidationError as error:
        raise ModelFormatError(f"config.json: rope type yarn: {error}", field="rope_scaling") from None
    numbers = [float(getattr(found, name)) for name in Yarn.__struct_fields__]
    if (
        not all(map(math.isfinite, numbers))
        or min(numbers[:4]) <= 0
        or min(numbers[4:]) < 0
        or found.beta_slow >= found.beta_fast
    ):
        raise ModelFormatError(
            f"config.json: rope type yarn has {given}: factor, original_max_position_embeddings and betas "
            "must be positive, beta_slow below beta_fast, mscale and mscale_all_dim not negative",
            field="rope_scaling",
        )
    return found
