"""One rank on a GPU from its parts, and the order in which its memory is taken.

Arena and KV range first, then everything that a step allocates (graphs, then the largest step), and
last the KV blocks that the rest of the budget holds.
"""

import mmap
from dataclasses import replace
from typing import Any

import torch

from kv.tensors import KVLayout, KVTensors, LayerCache
from models.deepseek_config import DeepseekConfig
from models.memory import StepLimits, expanded_tokens
from models.spec import KVGroup, ModelSpec
from protocol.control import Boot
from protocol.errors import UnsupportedModelError
from protocol.topology import Topology
from worker.assemble import RankLimits
from worker.backends.base import LatentAttention, LatentHeads
from worker.backends.cuda.attention import CudaAttention
from worker.backends.cuda.backend import CudaBackend
from worker.backends.cuda.comm import CudaCommunicator
from worker.backends.cuda.cublaslt import WORKSPACE_BYTES, CublasLt
from worker.backends.cuda.device import Device
from worker.backends.cuda.gemm_table import GemmTable, read, table_path
from worker.backends.cuda.graphs import LADDER, SHORT_LADDER
from worker.backends.cuda.latent import CudaLatents
from worker.backends.cuda.latent_own import LatentShape
from worker.backends.cuda.linear import Linear
from worker.backends.cuda.memory import DeviceRange
from worker.backends.cuda.runner import CudaRunner
from worker.backends.cuda.sampler import CudaSampler
from worker.backends.cuda.step_inputs import StepInputs
from worker.backends.cuda.warmup import CudaWarmUp, warm_blocks
from worker.boot import BootWork
from worker.layers.parts import Parts
from worker.layers.weights import Weights
from worker.models.base import build
from worker.steps import StepTimes

SPARE_BYTES = 2 << 30
"""Addresses that KV has beyond the plan, for what the plan charged and the device did not need."""
MARGIN_BYTES = 64 << 20
"""What stays free of a budget: the allocator's pieces need not fall the same way in every step."""
TURNS_STEP_TOKENS = 512
"""The warm-up's largest step where ranks share a GPU: each of its messages costs a turn of every rank, and
what it would take is planned, not measured, there."""


class _ByGroup:
    """The attention of a layer's own KV group."""

    def __init__(self, attention: tuple[CudaAttention | CudaLatents, ...]) -> None:
        self._attention = attention

    def run(
        self, queries: torch.Tensor, cache: LayerCache, plan: Any, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See ``CudaAttention.run``."""
        group = self._attention[cache.group]
        assert isinstance(group, CudaAttention), cache.group
        return group.run(queries, cache, plan, out)

    def latents(self, heads: LatentHeads, cache: LayerCache) -> LatentAttention:
        """See ``CudaLatents.layer``."""
        group = self._attention[cache.group]
        assert isinstance(group, CudaLatents), cache.group
        return group.layer(heads, cache)


def _check_packing(spec: ModelSpec) -> None:
    """Refuse packed weights that no kernel takes."""
    for parameter in spec.parameters:
        if parameter.scales_of is not None and not parameter.stack:
            raise UnsupportedModelError(
                f"{parameter.scales_of} is packed, on a GPU routed experts in int4 may be: serve this "
                "model with --device cpu"
            )


def _attention_of(
    spec: ModelSpec, group: KVGroup, topology: Topology, boot: Boot, device: Device
) -> CudaAttention | CudaLatents:
    """Return the attention of a KV group on one rank."""
    heads, max_blocks = spec.heads // topology.tp, -(-boot.context // boot.block_tokens)
    dtype, is_float8 = getattr(torch, spec.dtype), group.dtype == "float8"
    if group.is_local:
        raise UnsupportedModelError(
            f"KV group {group.name!r} is {group.kind} ({group.window} tokens), and attention on a GPU sees "
            "all positions: serve this model with --device cpu"
        )
    if group.kind == "latent":
        config = spec.config
        assert isinstance(config, DeepseekConfig), spec.architecture
        shape = LatentShape(
            heads=heads,
            latent=config.kv_latent,
            rope=config.rope_dim,
            nope_dim=config.nope_dim,
            value_dim=config.value_dim,
            scale=config.softmax_scale,
            dtype=dtype,
            block_tokens=boot.block_tokens,
            max_rows=boot.max_rows,
            max_blocks=max_blocks,
            step_tokens=boot.step_tokens,
            is_float8=is_float8,
        )
        return CudaLatents(device.kernels, device.operators, shape, device.torch_device)
    step_limits = StepLimits(boot.max_rows, boot.step_tokens, boot.logit_rows, boot.block_tokens)
    return CudaAttention(
        device.kernels,
        device.operators,
        heads=heads,
        kv_heads=group.local_heads(topology),
        key_dim=group.key_dim,
        value_dim=group.value_dim,
        dtype=dtype,
        block_tokens=boot.block_tokens,
        max_rows=boot.max_rows,
        max_blocks=max_blocks,
        step_tokens=boot.step_tokens,
        device=device.torch_device,
        is_float8=is_float8,
        expanded_tokens=expanded_tokens(spec, step_limits),
    )


class Assembled:
    """A rank that can run steps once its weights are placed."""

    def __init__(self, work: BootWork, device: Device, comm: CudaCommunicator) -> None:
        boot, spec, topology = work.boot, work.spec, comm.topology
        _check_packing(spec)
        if topology.dcp > 1:
            raise UnsupportedModelError(
                f"KV kept by position over {topology.dcp} ranks is served on CPUs: on GPUs take dcp 1",
                field="dcp",
            )
        self._device, self._comm, self._limits = device, comm, RankLimits.of(boot)
        layers = work.stages[topology.stage(boot.rank)]
        takes_turns = topology.world_size > 1 and not device.is_alone
        warm = self._limits
        if takes_turns:
            warm = replace(warm, step_tokens=min(warm.step_tokens, TURNS_STEP_TOKENS))
        self._block_bytes = boot.kv_bytes // boot.num_blocks
        self._most_blocks = boot.num_blocks + (SPARE_BYTES // self._block_bytes if device.is_alone else 0)
        self._arena = DeviceRange(device.ordinal, work.held.size)
        self._arena.map(0, self._arena.size)
        granule = self._arena.granule
        self._layout = KVLayout.of(
            spec,
            layers,
            topology,
            self._most_blocks,
            boot.block_tokens,
            self._block_bytes * self._most_blocks,
            granule,
        )
        self._kv = DeviceRange(device.ordinal, self._layout.size_bytes)
        self._mapped_blocks = 0
        self._map_blocks(min(warm_blocks(warm), boot.num_blocks))
        cache = KVTensors(spec, topology, self._layout, self._kv)
        max_blocks = -(-boot.context // boot.block_tokens)
        self._attention = tuple(
            _attention_of(spec, group, topology, boot, device) for group in spec.kv_groups
        )
        lt = CublasLt(device.torch_device)
        table = GemmTable(read(table_path(device.kernel_cache, device.name, lt.version)))
        linear = Linear(device.kernels, lt, table)
        backend = CudaBackend(device.torch_device, device.kernels, _ByGroup(self._attention), linear)
        weights = Weights(work.held, topology, topology.tp_rank(boot.rank), self._arena)
        with device.torch_device:
            model = build(
                Parts(weights, cache, backend, comm),
                spec,
                layers,
                boot.context,
                is_first=topology.is_first(boot.rank),
                is_last=topology.is_last(boot.rank),
            )
        inputs = StepInputs(
            device.kernels,
            device.torch_device,
            groups=len(spec.kv_groups),
            max_rows=boot.max_rows,
            max_blocks=max_blocks,
            max_tokens=boot.step_tokens,
            block_tokens=boot.block_tokens,
        )
        sampler = None
        if topology.is_last(boot.rank):
            sampler = CudaSampler(
                device.kernels,
                comm,
                device.torch_device,
                spec.vocab_size,
                boot.max_rows,
                inputs.last_tokens,
            )
        self.runner = CudaRunner(
            spec,
            model,
            self._attention,
            sampler,
            inputs,
            comm,
            self._limits.batch(spec),
            device,
            SHORT_LADDER if takes_turns else LADDER,
        )
        self._warm_up = CudaWarmUp(self.runner, comm, spec, warm)

    def place(self, memory: mmap.mmap) -> None:
        """Copy the weights, which lie in the arena's layout, to the device; ``memory`` may go after it."""
        size = min(len(memory), self._arena.size)
        host = torch.frombuffer(memory, dtype=torch.uint8, count=size)
        self._arena.view(torch.uint8, size, 0).copy_(host)
        torch.cuda.synchronize()

    def warm_up(self) -> StepTimes:
        """Capture the graphs and run the largest steps; return what steps take."""
        self.runner.capture()
        # What capturing took beside the graphs' own memory lies in pieces of all sizes; the largest step,
        # run first, then takes what every other one fits in.
        torch.cuda.empty_cache()
        return self._warm_up.run()

    def map_rest(self) -> int:
        """Give KV what is left of the budget; return its blocks."""
        blocks = self._limits.num_blocks
        if self._device.is_alone:
            left = self._device.budget_bytes - self._device.used_bytes() - MARGIN_BYTES
            # Each layer's run of blocks is rounded up to a granule.
            left -= self._kv.granule * len(self._layout.places)
            blocks = min(self._mapped_blocks + max(left, 0) // self._block_bytes, self._most_blocks)
        self._map_blocks(blocks)
        self.runner.grant(blocks)
        return blocks

    def lines(self) -> dict[str, int]:
        """Return the measured lines of the memory plan, bytes."""
        found = {
            "weights": self._arena.mapped_bytes,
            "kv cache": self._kv.mapped_bytes,
            "communicator": self._comm.buffer_bytes,
            "workspace": sum(one.workspace_bytes for one in self._attention) + WORKSPACE_BYTES,
            "logits": self.runner.logit_bytes,
        }
        # What the allocator holds for graphs and the largest step, beside the lines that are in it too.
        found["activations"] = torch.cuda.memory_reserved() - found["workspace"] - found["logits"]
        if self._device.is_alone:
            found["runtime"] = self._device.used_bytes() - sum(found.values())
        return found

    def _map_blocks(self, blocks: int) -> None:
        """Have the first ``blocks`` of every layer mapped."""
        granule = self._kv.granule
        page = self._layout.layer_bytes // self._layout.num_blocks
        start = -(-self._mapped_blocks * page // granule) * granule
        end = -(-blocks * page // granule) * granule
        for offset in self._layout.places:
            self._kv.map(offset + start, end - start)
        self._mapped_blocks = blocks
