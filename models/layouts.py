"""Every way to lay a model over given GPUs, each with its memory and speed, and which is best.

Without torch and without a GPU: ``tandem plan --gpus`` prints what stands here, ``serve --layout auto``
takes the best. Memory is ``models.memory``'s, speed is ``models.speed``'s.
"""

import math
from typing import Final, Literal

import msgspec

from models.blocks import BlockNeeds
from models.layout import WeightBytes, check_degrees
from models.machines import DRIVE_BYTES_S, Machines, check_drive
from models.memory import DeviceOverheads, MemoryLine, RankPlan, StepLimits, divide_memory
from models.spec import ModelSpec
from models.speed import Decode, Pace, Traffic
from protocol.errors import InvalidRequestError, LayoutError
from protocol.topology import Topology

Prefer = Literal["latency", "throughput"]

CLASS_SLACK: Final = 1.25
"""How many times worse than the best layout one may be and still be of the class that is preferred."""

USUAL_CONTEXT: Final = 8192
"""Tokens that speeds are reckoned at where no context is asked and the model has more."""


class Asked(msgspec.Struct, frozen=True):
    """What a layout is to do."""

    context: int | None = None
    """Tokens that a request must be able to hold; None: no demand."""
    concurrency: int = 64
    """Requests that decode at a time, where the memory holds so many."""
    drive_bytes_s: float = DRIVE_BYTES_S
    """Of each machine's drive."""
    prefer: Prefer = "latency"
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    """1 or tp; None: both, where the model has experts. ``dcp`` None: all that the model's KV heads let."""
    dcp: int | None = None


class Layout(msgspec.Struct, frozen=True):
    """One layout. Figures in bytes are those of its tightest rank."""

    tp: int
    pp: int
    ep: int
    dcp: int
    fits: bool
    """Whether it holds one request of the asked context, or one block of tokens where none is asked."""
    lacks_bytes: int
    """What the rank that lacks most would need beside its budget; 0 where it fits."""
    rank: int
    """The tightest."""
    budget_bytes: int
    weights_bytes_per_rank: int
    kv_bytes_per_rank: int
    lines: tuple[MemoryLine, ...]
    """Everything that takes memory on it, weights and KV among them."""
    stages: tuple[tuple[int, int], ...]
    """Layers [first, end) of each."""
    kv_tokens: int
    """That the pool holds in requests of ``Matrix.context`` tokens, in all layers."""
    global_kv_tokens: int
    """That it would hold if local layers (a window, a chunk) needed nothing."""
    requests: int
    """Of ``Matrix.context`` tokens, that fit at a time."""
    boot_s: float
    first_token_s: float
    """The least time from a prompt of ``Matrix.context`` tokens to its first token, alone."""
    decode_one: Decode
    decode_many: Decode
    traffic: tuple[Traffic, ...]
    """What a rank sends in a step, by collective."""

    @property
    def topology(self) -> Topology:
        """The degrees."""
        return Topology(self.tp, self.pp, self.ep, self.dcp)

    @property
    def name(self) -> str:
        """How people call it."""
        return str(self.topology)


class Refused(msgspec.Struct, frozen=True):
    """Degrees that multiply to the GPUs and that the model cannot be cut into."""

    tp: int
    pp: int
    why: str


class Matrix(msgspec.Struct, frozen=True):
    """All layouts, the best first."""

    layouts: tuple[Layout, ...]
    best: int | None
    """Index of the one to take; None where nothing fits."""
    why: str
    """Why that one, in a sentence."""
    context: int
    """Tokens a request has where speeds and requests are counted."""
    prefer: Prefer
    refused: tuple[Refused, ...]


def lay_out(
    model: ModelSpec,
    machines: Machines,
    budget_bytes: int,
    limits: StepLimits,
    overheads: DeviceOverheads,
    asked: Asked,
    checkpoint_bytes: int,
) -> Matrix:
    """Return every layout of one rank a GPU, each rank with ``budget_bytes``.

    ``checkpoint_bytes``: of all tensors, which a boot reads.
    Errors: ``LayoutError`` where no degrees are possible, or not those asked; ``InvalidRequestError`` for a
    context that the model does not have, or a drive that is none.
    """
    if asked.context is not None and not 1 <= asked.context <= model.max_context:
        raise InvalidRequestError(
            f"a context of {asked.context} tokens was asked, the model has {model.max_context}: "
            "ask for 1 to that",
            field="context",
        )
    check_drive(asked.drive_bytes_s)
    context = asked.context or min(model.max_context, USUAL_CONTEXT)
    found, refused = [], []
    sizes = WeightBytes(model)
    of_views = None
    for group in _topologies(machines.num_gpus, asked):
        try:
            check_degrees(model, group)
            topologies = _views(model, group, asked)
        except LayoutError as error:
            refused.append(Refused(group.tp, group.pp, error.message))
            if error.field in ("ep", "dcp"):
                of_views = of_views or error
            continue
        for topology in topologies:
            sized = msgspec.structs.replace(limits, block_tokens=topology.whole_block(limits.block_tokens))
            budgets = [budget_bytes] * topology.world_size
            ranks = divide_memory(model, topology, budgets, sized, overheads, sizes)
            pace = Pace(model, topology, ranks, machines, sized.step_tokens, sizes)
            found.append(_layout(model, topology, ranks, pace, sized, asked, context, checkpoint_bytes))
    if not found:
        if of_views is not None:
            raise of_views
        raise LayoutError(_nothing_possible(model, machines.num_gpus, refused), field="gpus")
    layouts, why = _ranked(tuple(found), asked.prefer)
    return Matrix(layouts, 0 if layouts[0].fits else None, why, context, asked.prefer, tuple(refused))


def _topologies(num_gpus: int, asked: Asked) -> list[Topology]:
    """Return the degrees that multiply to the GPUs and are those asked (``LayoutError`` where none are)."""
    divisors = [d for d in range(1, num_gpus + 1) if num_gpus % d == 0]
    for name, degree in (("tp", asked.tp), ("pp", asked.pp)):
        if degree is not None and degree not in divisors:
            raise LayoutError(
                f"{name} {degree} does not divide {num_gpus} GPUs; degrees that do: "
                f"{', '.join(map(str, divisors))}",
                field=name,
            )
    found = [
        Topology(tp, num_gpus // tp)
        for tp in reversed(divisors)
        if asked.tp in (None, tp) and asked.pp in (None, num_gpus // tp)
    ]
    if not found:
        assert asked.tp is not None
        assert asked.pp is not None
        raise LayoutError(
            f"tp {asked.tp} x pp {asked.pp} are {asked.tp * asked.pp} ranks, the GPUs {num_gpus}: give "
            f"tp {asked.tp} pp {num_gpus // asked.tp}, or tp {num_gpus // asked.pp} pp {asked.pp}, or one "
            "of the two degrees",
            field="pp",
        )
    return found


def _views(model: ModelSpec, group: Topology, asked: Asked) -> list[Topology]:
    """Return a group with each of its views that the model allows, or those asked.

    Errors: ``LayoutError`` where a view that is asked is not possible.
    """
    tp = group.tp
    check_views(tp, asked.ep or 1, asked.dcp or 1)
    eps = [1, tp] if tp > 1 and any(parameter.stack for parameter in model.parameters) else [1]
    dcps = [d for d in range(1, tp + 1) if tp % d == 0]
    eps = eps if asked.ep is None else [asked.ep]
    dcps = dcps if asked.dcp is None else [asked.dcp]
    found = []
    for ep in eps:
        for dcp in dcps:
            topology = Topology(tp, group.pp, ep, dcp)
            try:
                check_degrees(model, topology)
            except LayoutError as error:
                if error.field is not None and getattr(asked, error.field) is not None:
                    raise
                continue
            found.append(topology)
    return found


def check_views(tp: int, ep: int, dcp: int) -> None:
    """Refuse views that a group of ``tp`` ranks does not have, whatever the model (``LayoutError``)."""
    if ep not in (1, tp):
        raise LayoutError(
            f"experts are placed over a whole group: ep {ep} is neither 1 nor tp {tp}", field="ep"
        )
    if tp % dcp:
        fits = [d for d in range(1, tp + 1) if tp % d == 0]
        raise LayoutError(
            f"dcp {dcp} does not divide tp {tp}; degrees that do: {', '.join(map(str, fits))}", field="dcp"
        )


def _layout(
    model: ModelSpec,
    topology: Topology,
    ranks: tuple[RankPlan, ...],
    pace: Pace,
    limits: StepLimits,
    asked: Asked,
    context: int,
    checkpoint_bytes: int,
) -> Layout:
    needs = BlockNeeds.of(model, topology, limits.block_tokens, limits.step_tokens)
    blocks = needs.of_request(asked.context or 1)
    lacks = max(max(rank.budget_for(blocks) - rank.budget_bytes for rank in ranks), 0)
    # Where it does not fit, all KV may be nothing: then the rank that lacks most is the tightest.
    tightest = min(
        ranks,
        key=lambda r: (r.kv_bytes // r.block_bytes, min(r.budget_bytes - r.budget_for(blocks), 0)),
    )
    by_name = {line.name: line.predicted_bytes for line in tightest.lines}
    num_blocks = tightest.kv_bytes // tightest.block_bytes
    requests = num_blocks // needs.of_request(context)
    return Layout(
        tp=topology.tp,
        pp=topology.pp,
        ep=topology.ep,
        dcp=topology.dcp,
        fits=not lacks,
        lacks_bytes=lacks,
        rank=tightest.rank,
        budget_bytes=tightest.budget_bytes,
        weights_bytes_per_rank=by_name["weights"],
        kv_bytes_per_rank=tightest.kv_bytes,
        lines=tightest.lines,
        stages=tuple(
            (ranks[group.start].layers.start, ranks[group.start].layers.stop)
            for group in map(topology.tp_group, range(topology.pp))
        ),
        kv_tokens=needs.held(num_blocks, context),
        global_kv_tokens=needs.held_globally(num_blocks),
        requests=requests,
        boot_s=pace.boot_s(checkpoint_bytes, asked.drive_bytes_s),
        first_token_s=pace.first_token_s(context),
        decode_one=pace.decode(1, context),
        decode_many=pace.decode(max(min(asked.concurrency, requests), 1), context),
        traffic=pace.traffic(),
    )


def _nothing_possible(model: ModelSpec, num_gpus: int, refused: list[Refused]) -> str:
    tried = "; ".join(f"tp {r.tp} pp {r.pp}: {r.why}" for r in refused[:3])
    fits = [d for d in range(1, model.heads + 1) if _is_possible(model, d)]
    return (
        f"{num_gpus} GPUs cannot be filled ({tried}): the model can be cut by tp "
        f"{', '.join(map(str, fits))} and pp up to {model.num_layers}, give --gpus a product of the two"
    )


def _is_possible(model: ModelSpec, tp: int) -> bool:
    try:
        check_degrees(model, Topology(tp))
    except LayoutError:
        return False
    return True


def _ranked(found: tuple[Layout, ...], prefer: Prefer) -> tuple[tuple[Layout, ...], str]:
    """Return the layouts, best first, and why the first is.

    Those that fit before those that do not; of these, those of the preferred class by KV tokens, then the
    others by KV tokens. What does not fit is sorted by what it lacks.
    """
    fitting = [layout for layout in found if layout.fits]
    if not fitting:
        ranked = sorted(found, key=lambda layout: layout.lacks_bytes)
        nearest = ranked[0]
        lacks = f"{nearest.lacks_bytes / 2**30:.2f} GiB on rank {nearest.rank}"
        return tuple(ranked), (
            f"nothing fits: {nearest.name} is nearest, holds {nearest.kv_tokens:,} tokens and lacks "
            f"{lacks}; take more or larger GPUs" + (", or a smaller --context" if nearest.kv_tokens else "")
        )
    costs = {layout.name: _cost(layout, prefer) for layout in found}
    for layout in found:
        # Keeping positions apart costs messages, never the class: it is on where it holds more.
        whole = str(Topology(layout.tp, layout.pp, layout.ep))
        costs[layout.name] = min(costs[layout.name], costs.get(whole, math.inf))
    quickest = min(fitting, key=lambda layout: _cost(layout, prefer))
    bound = CLASS_SLACK * _cost(quickest, prefer)

    def key(layout: Layout) -> tuple[bool, bool, int, float, int]:
        kv = -layout.kv_tokens if layout.fits else layout.lacks_bytes
        return not layout.fits, costs[layout.name] > bound, kv, _cost(layout, prefer), -layout.tp

    ranked = sorted(found, key=key)
    of_class = sum(costs[layout.name] <= bound for layout in fitting)
    why = _reason(ranked[0], len(fitting), of_class, quickest, prefer)
    return tuple(ranked), why + _of_views(ranked[0], found)


def _of_views(best: Layout, found: tuple[Layout, ...]) -> str:
    """Return what the best layout's views of its groups are worth and cost, where it has some."""
    for alone in found:
        if alone.topology == Topology(best.tp, best.pp) and alone is not best:
            times = f"{alone.decode_one.token_s * 1e3:.2f} ms, not {best.decode_one.token_s * 1e3:.2f}"
            return f"; {alone.name} alone holds {alone.kv_tokens:,}, and a token at 1 request takes {times}"
    return ""


def _cost(layout: Layout, prefer: Prefer) -> float:
    """Return what a class compares, the less the better."""
    return layout.decode_one.token_s if prefer == "latency" else 1 / layout.decode_many.tokens_s


def _reason(best: Layout, fitting: int, of_class: int, quickest: Layout, prefer: Prefer) -> str:
    tokens = f"{best.kv_tokens:,} KV tokens"
    if best.global_kv_tokens > best.kv_tokens:
        tokens += f" ({best.global_kv_tokens:,} by the global layers alone)"
    if fitting == 1:
        return f"{best.name}: the only layout that fits, {tokens}"
    if prefer == "latency":
        among = f"where a token at 1 request takes at most {CLASS_SLACK:g} times the quickest"
        record = f"{quickest.name}, {quickest.decode_one.token_s * 1e3:.2f} ms"
    else:
        among = f"that give at least {1 / CLASS_SLACK:.0%} of the most tokens a second"
        record = f"{quickest.name}, {quickest.decode_many.tokens_s:,.0f}"
    record += "; reckoned with dcp 1" if best.dcp > 1 else ""
    alone = "" if of_class > 1 else "; no other is among them"
    return f"{best.name}: {tokens}, the most of the layouts {among} ({record}){alone}"
