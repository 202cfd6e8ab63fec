"""One rank from its parts: weights and KV become layers, layers a stage, the stage a runner."""

import mmap
from dataclasses import dataclass

from kv.tensors import KVTensors
from models.layout import Arena
from models.spec import ModelSpec
from worker.backends.cpu import CpuBackend
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
    cache = KVTensors(spec, layers, topology.tp, limits.num_blocks, limits.block_tokens, limits.kv_bytes)
    backend = CpuBackend()
    weights = Weights(held, topology.tp, topology.tp_rank(rank), memory)
    model = build(
        Parts(weights, cache, backend, comm),
        spec,
        layers,
        limits.context,
        is_first=topology.is_first(rank),
        is_last=topology.is_last(rank),
    )
    batch_limits = BatchLimits(
        limits.max_rows,
        limits.step_tokens,
        limits.context,
        spec.vocab_size,
        len(spec.kv_groups),
        limits.num_blocks,
        limits.block_tokens,
    )
    widths = tuple(
        group.local_heads(topology.tp) * (group.key_dim + group.value_dim) for group in spec.kv_groups
    )
    runner = Runner(spec, model, backend, comm, batch_limits, limits.logit_rows, widths)
    return Assembled(runner, cache.size_bytes)
