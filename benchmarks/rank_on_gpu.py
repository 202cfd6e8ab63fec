"""One rank on the first GPU in this process: takes plans and answers them, without an orchestrator."""

import mmap
import queue
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from loader.index import read_index
from loader.plan import plan_load
from loader.reader import load
from models.blocks import block_bytes
from models.layout import arena
from models.registry import load_spec
from models.spec import ModelSpec
from protocol.control import Boot, StepPlan, StepResult
from protocol.topology import Topology
from worker.assemble import RankLimits
from worker.backends.cuda.assemble import Assembled
from worker.backends.cuda.comm import CudaCommunicator
from worker.backends.cuda.device import Device
from worker.boot import BootWork, Spans

WAIT_S = 60.0
BUDGET_BYTES = 8 << 30


@cache
def device(kernel_cache: Path | None) -> Device:
    """The first GPU, opened once: its stream stays current. Without a cache, kernels are compiled anew."""
    directory = kernel_cache or Path(tempfile.mkdtemp(prefix="tandem-kernels-"))
    return Device.open(0, directory, BUDGET_BYTES, is_alone=False)


@dataclass
class CudaInstance:
    """Takes plans and answers them."""

    topology: Topology
    spec: ModelSpec
    limits: RankLimits
    assembled: Assembled
    results: "queue.Queue[StepResult | Exception]"
    num_steps: int = 0

    def send(self, plan: StepPlan) -> None:
        """Give the rank a plan; returns when it is queued."""
        self.num_steps += 1
        self.assembled.runner.step(plan, self.results.put)

    def result(self) -> StepResult:
        """Wait for the next answer."""
        found = self.results.get(timeout=WAIT_S)
        if isinstance(found, Exception):
            raise found
        return found


@contextmanager
def cuda_instance(
    directory: Path,
    *,
    dtype: str = "float32",
    kv_dtype: str = "auto",
    max_rows: int = 32,
    step_tokens: int = 512,
    num_blocks: int = 512,
    block_tokens: int = 16,
    context: int = 512,
    has_graphs: bool = True,
    kernel_cache: Path | None = None,
) -> Iterator[CudaInstance]:
    """Load a model directory and run its one rank until the block ends."""
    topology, spec = Topology(), load_spec(directory, dtype, kv_dtype)
    checkpoint = read_index(directory)
    stages = (range(spec.num_layers),)
    plan = plan_load(spec, checkpoint, topology, stages)
    memory = mmap.mmap(-1, plan.arena_bytes[0])
    load(plan, 0, {0: memoryview(memory)}, threads=4)
    boot = Boot(
        epoch=0,
        instance="test",
        rank=0,
        topology=topology,
        stages=[[0, spec.num_layers]],
        model_directory=str(directory),
        dtype=dtype,
        device="cuda:0",
        arena_fds=[],
        kv_bytes=num_blocks * block_bytes(spec, topology, stages[0], block_tokens),
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        budget_bytes=BUDGET_BYTES,
        device_ranks=2,
        kernel_cache="",
        max_rows=max_rows,
        step_tokens=step_tokens,
        logit_rows=max_rows,
        context=min(context, spec.max_context),
        threads=1,
        rendezvous="",
        collective_timeout_s=60.0,
        kv_dtype=kv_dtype,
    )
    held = arena(spec, topology, stages, 0)
    work = BootWork(boot, spec, held, stages, memory, Spans(0), lambda: None)
    assembled = Assembled(work, device(kernel_cache), CudaCommunicator(0, topology))
    assembled.place(memory)
    if has_graphs:
        assembled.warm_up()
    assembled.map_rest()
    try:
        yield CudaInstance(topology, spec, RankLimits.of(boot), assembled, queue.Queue())
    finally:
        assembled.runner.close()
        torch.cuda.synchronize()
