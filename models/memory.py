"""The memory plan: one line for each thing that takes memory on a rank, without torch.

The same arithmetic sizes the KV pool at boot, explains a refusal, and is what ``worker/memory.py``
holds its measurements against.
"""

import math

import msgspec

from models.blocks import BlockNeeds, block_bytes
from models.layout import WeightBytes, cut_stages
from models.parameter import DTYPE_BYTES
from models.spec import ModelSpec
from protocol.errors import MemoryBudgetError
from protocol.topology import Topology

MIB = 1 << 20

DIVIDED_BYTES = 16 * MIB
"""What attention holds at a time of what ranks of a dcp group send each other, on each rank."""


class DeviceOverheads(msgspec.Struct, frozen=True):
    """What a device kind takes beside the model, bytes a rank (docs/performance.md)."""

    runtime: int
    communicator_base: int
    communicator_per_peer: int
    workspace: int
    logit_bytes: int
    """For each row of logits and entry of a rank's part of the vocabulary."""
    whole_logit_bytes: int
    """The same for each entry of the whole vocabulary, where a row is gathered."""
    expands_float8: bool = False
    """Whether prefill copies float8 contexts in bf16, ``expanded_tokens`` together."""


CPU_OVERHEADS = DeviceOverheads(
    runtime=236 * MIB,
    communicator_base=2 * MIB,
    communicator_per_peer=1 * MIB,
    workspace=32 * MIB,
    # Raw logits, their tempered copy and the noise beside them, float32; gathered whole where a filter
    # needs the whole distribution.
    logit_bytes=12,
    whole_logit_bytes=8,
)


CUDA_OVERHEADS = DeviceOverheads(
    runtime=800 * MIB,
    communicator_base=0,
    communicator_per_peer=32 * MIB,
    workspace=96 * MIB,
    # Logits in float32, and what each token's count takes in 16 bits; gathered whole over ranks.
    logit_bytes=6,
    whole_logit_bytes=4,
    expands_float8=True,
)

_MOST_EXPANDED_TOKENS = 1 << 17


def expanded_tokens(model: ModelSpec, limits: "StepLimits") -> int:
    """Return how many tokens of float8 KV a GPU's prefill has room to copy together.

    A prompt that goes on from earlier steps, others that begin in this one, and what last pages waste.
    """
    earlier = min(model.max_context, _MOST_EXPANDED_TOKENS)
    return earlier + limits.step_tokens + limits.max_rows * limits.block_tokens


class MemoryLine(msgspec.Struct, frozen=True):
    """One thing that takes memory on a rank."""

    name: str
    predicted_bytes: int
    because: str


class StepLimits(msgspec.Struct, frozen=True):
    """What the largest step may be; activations are charged for it."""

    max_rows: int
    step_tokens: int
    logit_rows: int
    block_tokens: int


class RankPlan(msgspec.Struct, frozen=True):
    """The plan of one rank. Lines, KV among them, add up to no more than the budget."""

    rank: int
    layers: range
    budget_bytes: int
    lines: tuple[MemoryLine, ...]
    block_bytes: int
    kv_bytes: int

    def budget_for(self, num_blocks: int) -> int:
        """Return the budget with which the rank would hold so many blocks."""
        spent = sum(line.predicted_bytes for line in self.lines) - self.kv_bytes
        return spent + num_blocks * self.block_bytes


class MemoryPlan(msgspec.Struct, frozen=True):
    """The plan of an instance."""

    stages: tuple[range, ...]
    ranks: tuple[RankPlan, ...]
    num_blocks: int
    needs: BlockNeeds
    context: int
    """What one request may hold: the model's most, what was asked, or what fits."""
    note: str | None
    """Said to the user where the context had to be fitted."""

    @property
    def kv_tokens(self) -> int:
        """Tokens that the blocks hold in requests of ``context`` each, in all layers."""
        return self.needs.held(self.num_blocks, self.context)

    @property
    def global_kv_tokens(self) -> int:
        """Tokens that they would hold if local layers (a window, a chunk) needed none."""
        return self.needs.held_globally(self.num_blocks)

    def with_blocks(self, num_blocks: int) -> "MemoryPlan":
        """Return the plan with the blocks that the ranks found room for; no context is longer than they."""
        context, note = self.context, self.note
        longest = self.needs.longest(num_blocks)
        if longest < context:
            context = longest
            note = f"context fitted to {longest} tokens: the ranks found less room for KV than was planned"
        return msgspec.structs.replace(self, num_blocks=num_blocks, context=context, note=note)

    @property
    def tightest(self) -> RankPlan:
        """The rank that decides the number of blocks."""
        return min(self.ranks, key=lambda r: r.kv_bytes // r.block_bytes)


def divide_memory(
    model: ModelSpec,
    topology: Topology,
    budgets: list[int],
    limits: StepLimits,
    overheads: DeviceOverheads,
    sizes: WeightBytes | None = None,
) -> tuple[RankPlan, ...]:
    """Divide each rank's budget (bytes, one per rank) into lines; KV gets what is left, if anything.

    ``sizes``: the model's, where many topologies are asked.
    Errors: ``LayoutError`` for impossible degrees.
    """
    fixed = _fixed_lines(model, topology, limits, overheads)
    spent = sum(line.predicted_bytes for line in fixed)
    sizes = sizes or WeightBytes(model)
    stages = cut_stages(model, topology, min(budgets) - spent, sizes)
    weights = [sizes.stages(topology)[layers] for layers in stages]
    return tuple(
        _rank_plan(model, topology, stages, weights, rank, budgets[rank], fixed, limits)
        for rank in range(topology.world_size)
    )


def plan_memory(
    model: ModelSpec,
    topology: Topology,
    budgets: list[int],
    limits: StepLimits,
    overheads: DeviceOverheads,
    context: int | None,
) -> MemoryPlan:
    """Divide each rank's budget (bytes, one per rank) into the plan's lines; KV gets what is left.

    ``context`` None asks for the model's most and takes what fits; a number is a demand.
    Errors: ``MemoryBudgetError`` saying what would fit; ``LayoutError`` for impossible degrees.
    """
    ranks = divide_memory(model, topology, budgets, limits, overheads)
    stages = tuple(ranks[group].layers for group in range(0, topology.world_size, topology.tp))
    num_blocks = min(r.kv_bytes // r.block_bytes for r in ranks)
    needs = BlockNeeds.of(model, topology, limits.block_tokens, limits.step_tokens)
    wanted = context if context is not None else model.max_context
    if context is not None and context > model.max_context:
        raise MemoryBudgetError(
            f"a context of {context} tokens was asked, the model has {model.max_context}: "
            f"ask for that or less",
            field="context",
        )
    fits = min(wanted, needs.longest(num_blocks))
    tightest = min(ranks, key=lambda r: r.kv_bytes // r.block_bytes)
    if fits < 1 or (context is not None and fits < wanted):
        blocks = needs.of_request(wanted if context is not None else 1)
        needed = max(r.budget_for(blocks) for r in ranks)
        everywhere = _gib_up(needed * topology.world_size)
        smaller = "" if all(g.dtype == "float8" for g in model.kv_groups) else "--kv-dtype float8, "
        raise MemoryBudgetError(
            f"{tightest.budget_bytes / 2**30:.2f} GiB on rank {tightest.rank} hold a context of at most "
            f"{max(fits, 0)} tokens, {wanted} were asked: give it {_gib_up(needed)} GiB "
            f"({everywhere} over all {topology.world_size} ranks, --memory), more ranks, {smaller}or a "
            "smaller --context",
            field="memory",
        )
    note = None
    if fits < wanted:
        note = f"context fitted to {fits} of the model's {model.max_context} tokens by the memory for KV"
    return MemoryPlan(stages, ranks, num_blocks, needs, fits, note)


def _gib_up(num_bytes: int) -> str:
    """Return GiB that are enough: rounded up."""
    return f"{math.ceil(num_bytes * 100 / 2**30) / 100:.2f}"


def _rank_plan(
    model: ModelSpec,
    topology: Topology,
    stages: tuple[range, ...],
    stage_weights: list[int],
    rank: int,
    budget: int,
    fixed: tuple[MemoryLine, ...],
    limits: StepLimits,
) -> RankPlan:
    stage = topology.stage(rank)
    layers, weights = stages[stage], stage_weights[stage]
    block = block_bytes(model, topology, layers, limits.block_tokens)
    left = max(budget - weights - sum(line.predicted_bytes for line in fixed), 0)
    kv = left // block * block
    lines = (
        MemoryLine(
            "weights",
            weights,
            f"layers {layers.start} to {layers.stop - 1} in {model.dtype}, 1/{topology.tp} of each",
        ),
        *fixed,
        MemoryLine(
            "kv cache",
            kv,
            f"what is left: {kv // block} blocks of {limits.block_tokens} tokens in "
            + " and ".join(dict.fromkeys(group.dtype for group in model.kv_groups)),
        ),
    )
    return RankPlan(rank, layers, budget, lines, block, kv)


def _expanded_bytes(model: ModelSpec, topology: Topology, limits: StepLimits) -> int:
    """Return what a layer's expanded context takes on a rank, of each KV group."""
    elements = sum(
        group.local_heads(topology) * (group.key_dim + group.value_dim)
        for group in model.kv_groups
        if group.dtype == "float8" and group.value_dim
    )
    return expanded_tokens(model, limits) * elements * DTYPE_BYTES["bfloat16"]


def _fixed_lines(
    model: ModelSpec, topology: Topology, limits: StepLimits, overheads: DeviceOverheads
) -> tuple[MemoryLine, ...]:
    size, tp = DTYPE_BYTES[model.dtype], topology.tp
    activations = limits.step_tokens * math.ceil(model.activation_cut / tp)
    if model.chunks is not None:
        activations = max(activations, model.chunks.elements(limits.step_tokens, topology))
    activations += limits.step_tokens * model.activation_whole
    cut, whole = math.ceil(model.vocab_size / tp), model.vocab_size
    expanded = _expanded_bytes(model, topology, limits) if overheads.expands_float8 else 0
    divided = DIVIDED_BYTES if topology.dcp > 1 else 0
    logits = limits.logit_rows * (overheads.logit_bytes * cut + overheads.whole_logit_bytes * whole)
    return (
        MemoryLine("runtime", overheads.runtime, "interpreter, libraries, device context"),
        MemoryLine("activations", activations * size, f"a step of {limits.step_tokens} tokens"),
        MemoryLine("logits", logits, f"{limits.logit_rows} rows at a time"),
        MemoryLine(
            "workspace",
            overheads.workspace + expanded + divided,
            "attention's gathered context and score tiles",
        ),
        MemoryLine(
            "communicator",
            overheads.communicator_base
            + overheads.communicator_per_peer * (topology.world_size - 1)
            + limits.step_tokens * model.hidden_size * size * (topology.world_size > 1),
            f"{topology.world_size - 1} peers, buffers of the largest message",
        ),
    )
