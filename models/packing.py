"""How a checkpoint packs its matrices: read from config.json, and said of each packed parameter.

Two packings are served. ``int4``: compressed-tensors' pack-quantized, symmetric values of four bits in
groups of 32 along a row (source: the package's ``pack_to_int32``; eight values a word, the lowest bits
first, each stored as its value + 8). ``float8``: DeepSeek-V3's e4m3 codes in blocks of 128 × 128, each
with what its codes are multiplied by. A model's file states its parameters as if nothing were packed;
``Packing.parts`` makes of each packed one a parameter of codes and one of scales, cut alike. What is
packed is never unpacked whole: ``worker/backends`` multiplies by it.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from models.parameter import ParameterSpec, Segment
from protocol.errors import ModelFormatError, UnsupportedModelError

GROUP = 32
"""Values of a row that share a scale (int4)."""
PER_WORD = 8
"""Values of a word (int4)."""
BLOCK = 128
"""Rows, and columns, that share a scale (float8)."""

_FIELD = "quantization_config"
_PLAIN_PATTERN = re.compile(r"[\^$]|\\\.|\.\*|[\w.]|\((?:[\w.]+\|)*[\w.]+\)")
_MOST_WILDCARDS = 4


class Packing(msgspec.Struct, frozen=True):
    """How the matrices of a model's linear layers are stored, but for those ignored."""

    kind: Literal["int4", "float8"]
    ignored: tuple[str, ...] = ()
    """Regular expressions (from the start of a module's name), such as ``.*self_attn.*``."""

    def packs(self, source: str) -> bool:
        """Return whether the matrix that would be ``source`` unpacked (``….q_proj.weight``) is packed."""
        module = source.removesuffix(".weight")
        return not any(re.match(pattern, module) for pattern in self.ignored)

    def span(self, source: str, dim: int) -> int:
        """Return how many rows (``dim`` 0) or columns (1) of a matrix cannot be held apart."""
        if not self.packs(source):
            return 1
        if self.kind == "float8":
            return BLOCK
        return GROUP if dim == 1 else 1

    def parts(self, parameter: ParameterSpec) -> Iterator[ParameterSpec]:
        """Yield a matrix as it is stored: itself; or its codes, by its own name, and their scales.

        Errors: ``UnsupportedModelError`` where it is packed in part, or its sides are no whole groups.
        """
        each = len(parameter.segments) // (parameter.stack or 1)
        # Experts are alike. Where they were not, the checkpoint would lack what is called for.
        packed = {self.packs(segment.source) for segment in parameter.segments[:each]}
        if packed == {False}:
            yield parameter
            return
        if len(packed) > 1:
            raise UnsupportedModelError(
                f"{parameter.name} is made of packed and other matrices "
                f"({', '.join(s.source for s in parameter.segments[:each])}): all or none are served",
                field=_FIELD,
            )
        for segment in parameter.segments[:each]:
            self._check(segment, parameter, is_last=segment is parameter.segments[each - 1])
        scales = f"{parameter.name}_scales"
        if self.kind == "int4":
            yield self._as(parameter, parameter.name, "weight_packed", (1, PER_WORD), "int32")
            yield self._as(parameter, scales, "weight_scale", (1, GROUP), parameter.dtype, parameter.name)
        else:
            yield self._as(parameter, parameter.name, "weight", (1, 1), "float8_e4m3fn")
            yield self._as(parameter, scales, "weight_scale_inv", (BLOCK, BLOCK), "float32", parameter.name)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Patterns of tensors that say what the shapes of others say too."""
        return (r".+_proj\.weight_shape",) if self.kind == "int4" else ()

    def _check(self, segment: Segment, parameter: ParameterSpec, *, is_last: bool) -> None:
        rows, columns = segment.shape
        cut = parameter.cut
        span = self.span(segment.source, cut.dim) if cut is not None else 1
        ragged = self.kind == "int4" and columns % GROUP
        ragged = ragged or (self.kind == "float8" and not is_last and rows % BLOCK)
        if ragged or (cut is not None and segment.shape[cut.dim] // segment.units % span):
            side = BLOCK if self.kind == "float8" else GROUP
            raise UnsupportedModelError(
                f"{segment.source} is {rows} × {columns}, to be held in {segment.units} equal parts: "
                f"packed as {self.kind}, {side} features share a scale: parts of whole {side}s are served",
                field=_FIELD,
            )

    @staticmethod
    def _as(
        parameter: ParameterSpec,
        name: str,
        tensor: str,
        divisors: tuple[int, int],
        dtype: str,
        scales_of: str | None = None,
    ) -> ParameterSpec:
        # Hundreds of experts have a few shapes.
        shapes = {shape: _divided(shape, divisors) for shape in {s.shape for s in parameter.segments}}
        segments = tuple(
            Segment(s.source.removesuffix("weight") + tensor, shapes[s.shape], s.units)
            for s in parameter.segments
        )
        return msgspec.structs.replace(
            parameter, name=name, segments=segments, dtype=dtype, scales_of=scales_of
        )


def _divided(shape: tuple[int, ...], divisors: tuple[int, int]) -> tuple[int, ...]:
    return tuple(math.ceil(extent / divisor) for extent, divisor in zip(shape, divisors, strict=True))


def packing_of(raw: dict[str, Any] | None) -> Packing | None:
    """Return what ``quantization_config`` says; None where there is none.

    Errors: ``UnsupportedModelError`` naming what is served, ``ModelFormatError`` for a malformed one.
    """
    if raw is None:
        return None
    method = raw.get("quant_method")
    if method == "compressed-tensors":
        return _pack_quantized(raw)
    if method == "fp8":
        expected = {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
        for name, value in expected.items():
            _require(name, raw.get(name), value)
        _require("modules_to_not_convert", raw.get("modules_to_not_convert") or None, None)
        return Packing("float8")
    raise UnsupportedModelError(
        f"weights packed by {method!r} are not served: compressed-tensors (pack-quantized, int4 in groups "
        f"of {GROUP}) and fp8 (blocks of {BLOCK} × {BLOCK}) are",
        field=_FIELD,
    )


def _pack_quantized(raw: dict[str, Any]) -> Packing:
    _require("format", raw.get("format"), "pack-quantized")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ModelFormatError(f"config.json: config_groups is {groups!r:.80}, not groups", field=_FIELD)
    _require("number of config_groups", len(groups), 1)
    (group,) = groups.values()
    _require("targets", group.get("targets"), ["Linear"])
    _require("input_activations", group.get("input_activations"), None)
    _require("output_activations", group.get("output_activations"), None)
    _require("format of a group", group.get("format") or "pack-quantized", "pack-quantized")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ModelFormatError(
            f"config.json: weights of config_groups is {weights!r:.80}, no object", field=_FIELD
        )
    expected = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    for name, value in expected.items():
        _require(name, weights.get(name), value)
    _require("actorder", weights.get("actorder") or None, None)
    _require("dynamic", weights.get("dynamic") or False, False)
    ignored = raw.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise ModelFormatError(f"config.json: ignore is {ignored!r:.80}, no list of names", field=_FIELD)
    return Packing("int4", tuple(_pattern(name) for name in ignored))


def _pattern(name: str) -> str:
    """Return an entry of ``ignore`` as a regular expression; a hostile one could match for hours."""
    if not name.startswith("re:"):
        return re.escape(name) + "$"
    pattern = name.removeprefix("re:")
    if _PLAIN_PATTERN.sub("", pattern) or pattern.count("*") > _MOST_WILDCARDS:
        raise UnsupportedModelError(
            f"ignore has the pattern {pattern!r:.80}: names, '.*' (at most {_MOST_WILDCARDS}) and (a|b) "
            "are served",
            field=_FIELD,
        )
    return pattern


def _require(name: str, found: object, served: object) -> None:
    if type(found) is not type(served) or found != served:
        raise UnsupportedModelError(
            f"packed weights with {name} {found!r:.80} are not served: {served!r} is", field=_FIELD
        )
