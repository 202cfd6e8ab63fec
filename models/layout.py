"""Which rank holds which parameters, and where in its arena.

The arena is one flat run of bytes per rank; a parameter is an aligned view of it, so the bytes are
known exactly before anything is allocated.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import accumulate

import msgspec

from models.blocks import block_bytes
from models.parameter import ParameterSpec
from models.spec import ModelSpec
from protocol.errors import LayoutError
from protocol.topology import Topology

ALIGNMENT = 512
"""Bytes; a multiple of what any device's vector loads and O_DIRECT's sectors want."""


class Placed(msgspec.Struct, frozen=True):
    """A parameter of one rank and its first byte in the arena."""

    spec: ParameterSpec
    offset: int
    is_alias: bool = False
    """Its bytes are another parameter's: nothing is read for it."""


class Arena(msgspec.Struct, frozen=True):
    """One rank's weights."""

    rank: int
    size: int
    """Bytes, a multiple of ``ALIGNMENT``."""
    placed: tuple[Placed, ...]


def check_degrees(model: ModelSpec, topology: Topology) -> None:
    """Refuse degrees that the model cannot be cut into (``LayoutError``, saying which would do)."""
    if topology.pp > model.num_layers:
        raise LayoutError(
            f"pipeline parallel {topology.pp} is more than the model's {model.num_layers} layers",
            field="pp",
        )
    bad = _first_refusal(model, Topology(topology.tp, topology.pp))
    if bad is not None:
        fits = [d for d in range(1, model.heads + 1) if _first_refusal(model, Topology(d)) is None]
        raise LayoutError(
            f"tensor parallel {topology.tp} does not divide this model ({bad.message.split(';')[0]}); "
            f"degrees that do: {', '.join(map(str, fits))}",
            field="tp",
        )
    if topology.ep > 1:
        _check_placing(model, topology)
    if topology.dcp > 1:
        _check_positions(model, topology)


def _check_placing(model: ModelSpec, topology: Topology) -> None:
    """Refuse to place experts that are not there, or that the group does not divide."""
    stacks = {parameter.stack: parameter for parameter in model.parameters if parameter.stack}
    if not stacks:
        raise LayoutError(
            f"expert parallel {topology.ep} was asked, and the model has no routed experts: give ep 1",
            field="ep",
        )
    for parameter in stacks.values():
        parameter.local_parts(topology, 0)


def _check_positions(model: ModelSpec, topology: Topology) -> None:
    """Refuse to divide positions over ranks that do not keep the same heads."""
    for group in model.kv_groups:
        if group.is_local:
            raise LayoutError(
                f"dcp {topology.dcp} was asked, and {group.name!r} keeps {group.window} tokens of a "
                "request: positions are divided where all are kept, give dcp 1",
                field="dcp",
            )
        copies = topology.tp // min(topology.tp, group.kv_heads)
        if copies % topology.dcp:
            fits = [d for d in range(1, copies + 1) if copies % d == 0]
            raise LayoutError(
                f"dcp {topology.dcp} cannot divide positions over tp {topology.tp}: each of the "
                f"{group.kv_heads} KV heads of {group.name!r} is on {copies} ranks; degrees that do: "
                + ", ".join(map(str, fits)),
                field="dcp",
            )


def _first_refusal(model: ModelSpec, topology: Topology) -> LayoutError | None:
    # Layers of one model are alike enough that the first one of each shape decides.
    try:
        for spec in {p.name.split(".")[-1]: p for p in model.parameters}.values():
            spec.local_shape(topology)
        for group in model.kv_groups:
            group.local_heads(topology)
    except LayoutError as error:
        return error
    return None


def stage_parameters(model: ModelSpec, layers: range) -> tuple[ParameterSpec, ...]:
    """Return the parameters of the stage that runs ``layers``, in arena order."""
    first, last = layers.start == 0, layers.stop == model.num_layers
    return tuple(
        p
        for p in model.parameters
        if (p.place == "first" and first)
        or (p.place == "last" and last)
        or (p.place == "layer" and p.layer in layers)
    )


def arena(model: ModelSpec, topology: Topology, stages: tuple[range, ...], rank: int) -> Arena:
    """Return the arena of one rank."""
    placed: dict[str, Placed] = {}
    offset = 0
    for spec in stage_parameters(model, stages[topology.stage(rank)]):
        if spec.alias_of in placed:
            placed[spec.name] = Placed(spec, placed[spec.alias_of].offset, is_alias=True)
            continue
        placed[spec.name] = Placed(spec, offset)
        offset += _aligned(spec.local_bytes(topology))
    return Arena(rank, offset, tuple(placed.values()))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def stage_bytes(model: ModelSpec, topology: Topology, layers: range) -> int:
    """Return a stage's weights on one rank."""
    specs = stage_parameters(model, layers)
    names = {p.name for p in specs}
    return sum(_aligned(p.local_bytes(topology)) for p in specs if p.alias_of not in names)


class WeightBytes:
    """Bytes of one model's weights under many topologies, reckoned once for each tp and ep.

    A mixture's parameter has hundreds of segments; pp and dcp change nothing of what a rank holds of it.
    """

    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._layers: list[list[int]] = [[] for _ in range(model.num_layers)]
        self._ends: dict[str, list[int]] = {"first": [], "last": []}
        for index, spec in enumerate(model.parameters):
            (self._layers[spec.layer] if spec.place == "layer" else self._ends[spec.place]).append(index)
        self._sizes: dict[tuple[int, int], list[int]] = {}
        self._stages: dict[tuple[int, int], _StageBytes] = {}

    def read_by(self, topology: Topology, layers: range) -> list[tuple[ParameterSpec, int]]:
        """Return what a stage reads whole, all but the embedding, and a rank's bytes of each."""
        sizes = self._of(topology)
        indices = [index for layer in layers for index in self._layers[layer]]
        if layers.stop == self._model.num_layers:
            indices += self._ends["last"]
        return [(self._model.parameters[index], sizes[index]) for index in indices]

    def stages(self, topology: Topology) -> "_StageBytes":
        """Return ``stage_bytes`` by a stage's layers."""
        key = (topology.tp, topology.ep)
        if key not in self._stages:
            sizes = self._of(topology)
            specs = self._model.parameters
            names = {spec.name for spec in specs}
            held = [size for spec, size in zip(specs, sizes, strict=True) if spec.alias_of not in names]
            whole = sum(map(_aligned, held))
            per_layer = [sum(_aligned(sizes[i]) for i in indices) for indices in self._layers]
            ends = {place: sum(_aligned(sizes[i]) for i in at) for place, at in self._ends.items()}
            self._stages[key] = _StageBytes(per_layer, ends["first"], ends["last"], whole)
        return self._stages[key]

    def _of(self, topology: Topology) -> list[int]:
        key = (topology.tp, topology.ep)
        if key not in self._sizes:
            self._sizes[key] = [spec.local_bytes(topology) for spec in self._model.parameters]
        return self._sizes[key]


def cut_stages(
    model: ModelSpec, topology: Topology, budget_bytes: int, sizes: WeightBytes | None = None
) -> tuple[range, ...]:
    """Cut the layers into stages so that the KV tokens of the tightest stage are the most.

    ``budget_bytes`` is what one rank has for weights and KV. Maximises the minimum over stages of
    free bytes / KV bytes per token, padding among these; among cuts within 2 % of that, takes the one
    whose heaviest stage reads the fewest bytes (the fastest). Exact, by dynamic programming over the
    first layer of a stage. ``sizes``: the model's, where many topologies are asked.
    """
    check_degrees(model, topology)
    pp, count = topology.pp, model.num_layers
    if pp == 1:
        return (range(count),)
    weights, kv = (sizes or WeightBytes(model)).stages(topology), _StageKV(model, topology)

    @cache
    def tokens(start: int, end: int) -> float:
        # A stage over budget still has to compare: less over is better.
        layers = range(start, end)
        return (budget_bytes - weights[layers]) / max(kv[layers], 1)

    best = _partition(count, pp, tokens)
    floor = min(tokens(stage.start, stage.stop) for stage in best)
    floor -= 0.02 * abs(floor)

    @cache
    def lightness(start: int, end: int) -> float:
        return -weights[range(start, end)] if tokens(start, end) >= floor else -math.inf

    return _partition(count, pp, lightness)


class _StageBytes:
    """``stage_bytes`` of any range in constant time, from prefix sums over layers."""

    def __init__(self, per_layer: list[int], first: int, last: int, whole: int) -> None:
        """``whole``: of all layers on one stage, where the ends may share their bytes."""
        self._sums = [0, *accumulate(per_layer)]
        self._first, self._last, self._whole = first, last, whole

    def __getitem__(self, layers: range) -> int:
        count = len(self._sums) - 1
        if len(layers) == count:
            return self._whole
        size = self._sums[layers.stop] - self._sums[layers.start]
        if layers.start == 0:
            size += self._first
        if layers.stop == count:
            size += self._last
        return size


class _StageKV:
    """``block_bytes`` of the least block of any range in constant time.

    A block has room for the layers of any group: where a stage has more of one, the others are padded.
    """

    def __init__(self, model: ModelSpec, topology: Topology) -> None:
        (layer, *_) = model.kv_groups[0].layers
        # All groups keep the same of a token in a layer.
        self._layer_bytes = block_bytes(model, topology, range(layer, layer + 1), topology.dcp)
        self._counts = []
        for group in model.kv_groups:
            here = set(group.layers)
            self._counts.append([0, *accumulate(layer in here for layer in range(model.num_layers))])

    def __getitem__(self, layers: range) -> int:
        return self._layer_bytes * max(sums[layers.stop] - sums[layers.start] for sums in self._counts)


def _partition(count: int, parts: int, value: Callable[[int, int], float]) -> tuple[range, ...]:
    """Return the partition of ``range(count)`` into ``parts`` whose least value is greatest.

    ``value``: of layers from the first number up to the second. It is asked only where the parts before
    leave a chance to do better than what is known.
    """
    # best[p][end]: (least value, start of the last part) of [0, end) in p parts.
    best: list[dict[int, tuple[float, int]]] = [{0: (math.inf, 0)}]
    for p in range(1, parts + 1):
        row: dict[int, tuple[float, int]] = {}
        before = best[p - 1]
        # Only all layers are wanted of the last part.
        for end in range(count if p == parts else p, count - (parts - p) + 1):
            found = (-math.inf, -1)
            for start in range(end - 1, p - 2, -1):
                if start in before and before[start][0] > found[0]:
                    found = max(found, (min(before[start][0], value(start, end)), start))
            row[end] = found if found[1] >= 0 else (-math.inf, p - 1)
        best.append(row)
    stages: list[range] = []
    end = count
    for p in range(parts, 0, -1):
        start = best[p][end][1]
        stages.append(range(start, end))
        end = start
    return tuple(reversed(stages))
