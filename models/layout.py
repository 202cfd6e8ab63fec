"""Which rank holds which parameters, and where in its arena.

The arena is one flat run of bytes per rank; a parameter is an aligned view of it, so the bytes are
known exactly before anything is allocated.
"""

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


def cut_stages(model: ModelSpec, topology: Topology, budget_bytes: int) -> tuple[range, ...]:
    """Cut the layers into stages so that the KV tokens of the tightest stage are the most.

    ``budget_bytes`` is what one rank has for weights and KV. Maximises the minimum over stages of
    free bytes / KV bytes per token, padding among these; among cuts within 2 % of that, takes the one
    whose heaviest stage reads the fewest bytes (the fastest). Exact, by dynamic programming over the
    first layer of a stage.
    """
    check_degrees(model, topology)
    pp, count = topology.pp, model.num_layers
    if pp == 1:
        return (range(count),)
    weights, kv = _StageBytes(model, topology), _StageKV(model, topology)

    @cache
    def tokens(layers: range) -> float:
        # A stage over budget still has to compare: less over is better.
        return (budget_bytes - weights[layers]) / max(kv[layers], 1)

    best = _partition(count, pp, tokens)
    floor = min(tokens(stage) for stage in best)
    floor -= 0.02 * abs(floor)
    return _partition(
        count, pp, lambda layers: -weights[layers] if tokens(layers) >= floor else -float("inf")
    )


class _StageBytes:
    """``stage_bytes`` of any range in constant time, from prefix sums over layers."""

    def __init__(self, model: ModelSpec, topology: Topology) -> None:
        per_layer = [0] * model.num_layers
        for spec in model.parameters:
            if spec.place == "layer":
                per_layer[spec.layer] += _aligned(spec.local_bytes(topology))
        self._sums = [0]
        for size in per_layer:
            self._sums.append(self._sums[-1] + size)
        self._count = model.num_layers
        self._ends = {
            place: sum(_aligned(p.local_bytes(topology)) for p in model.parameters if p.place == place)
            for place in ("first", "last")
        }
        self._whole = stage_bytes(model, topology, range(model.num_layers))

    def __getitem__(self, layers: range) -> int:
        if len(layers) == self._count:
            return self._whole
        size = self._sums[layers.stop] - self._sums[layers.start]
        if layers.start == 0:
            size += self._ends["first"]
        if layers.stop == self._count:
            size += self._ends["last"]
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


def _partition(count: int, parts: int, value: Callable[[range], float]) -> tuple[range, ...]:
    """Return the partition of ``range(count)`` into ``parts`` whose least value is greatest."""
    # best[p][end]: (least value, start of the last part) of [0, end) in p parts.
    best: list[dict[int, tuple[float, int]]] = [{0: (float("inf"), 0)}]
    for p in range(1, parts + 1):
        row: dict[int, tuple[float, int]] = {}
        for end in range(p, count - (parts - p) + 1):
            row[end] = max(
                (min(best[p - 1][start][0], value(range(start, end))), start)
                for start in best[p - 1]
                if start < end
            )
        best.append(row)
    stages: list[range] = []
    end = count
    for p in range(parts, 0, -1):
        start = best[p][end][1]
        stages.append(range(start, end))
        end = start
    return tuple(reversed(stages))
