"""One rank from its parts: weights and KV become layers, layers a stage, the stage a runner."""

import mmap
from dataclasses import dataclass

from kv.tensors import HostRegion, KVLayout, KVTensors
from models.layout import Arena
from models.spec import ModelSpec
from protocol.control import Boot
from worker.backends.cpu import CpuBackend
from worker.backends.cpu_divided import Division
from worker.batch import BatchLimits
from worker.comm import Communicator
from worker.layers.parts import Parts
from worker.layers.weights import Weights
from worker.models.base import build
from worker.runner import Runner


@dataclass(frozen=True, slots=True)
class RankLimits:
    """What Boot says of sizes."""

    max_rows: int
    step_tokens: int
    logit_rows: int
    context: int
    num_blocks: int
    block_tokens: int
    kv_bytes: int

    @classmethod
    def of(cls, boot: Boot) -> "RankLimits":
        """Return what a rank was told."""
        return cls(
            boot.max_rows,
            boot.step_tokens,
            boot.logit_rows,
            boot.context,
            boot.num_blocks,
            boot.block_tokens,
            boot.kv_bytes,
        )

    def batch(self, spec: ModelSpec) -> BatchLimits:
        """Return what a plan may ask."""
        return BatchLimits(
            self.max_rows,
            self.step_tokens,
            self.context,
            spec.vocab_size,
            len(spec.kv_groups),
            self.num_blocks,
            self.block_tokens,
        )


@dataclass(frozen=True, slots=True)
class Assembled:
    """A rank that can run steps once its arena is filled."""

    runner: Runner
    kv_bytes: int


def assemble(
    spec: ModelSpec,
    held: Arena,
    memory: mmap.mmap,
    stages: tuple[range, ...],
    comm: Communicator,
    limits: RankLimits,
) -> Assembled:
    """Return the runner of ``comm.rank``; ``memory`` is its arena, which may still be filling."""
    topology, rank = comm.topology, comm.rank
    layers = stages[topology.stage(rank)]
    layout = KVLayout.of(spec, layers, topology, limits.num_blocks, limits.block_tokens, limits.kv_bytes)
    cache = KVTensors(spec, topology, layout, HostRegion.anonymous("tandem-kv", layout.size_bytes))
    converted = frozenset(g for g, group in enumerate(spec.kv_groups) if group.dtype != spec.dtype)
    chunks = {g: group.window for g, group in enumerate(spec.kv_groups) if group.kind == "chunked"}
    division = Division.of(topology, rank, comm.dcp)
    backend = CpuBackend(converted_groups=converted, chunks=chunks, division=division)
    weights = Weights(held, topology, topology.tp_rank(rank), HostRegion(memory))
    model = build(
        Parts(weights, cache, backend, comm),
        spec,
        layers,
        limits.context,
        is_first=topology.is_first(rank),
        is_last=topology.is_last(rank),
    )
    widths = tuple(
        group.local_heads(topology) * (group.key_dim + group.value_dim) for group in spec.kv_groups
    )
    runner = Runner(spec, model, backend, comm, limits.batch(spec), limits.logit_rows, widths)
    return Assembled(runner, layout.used_bytes)
