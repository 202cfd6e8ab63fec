"""One rank of an instance alone on a GPU: its weights are drawn there, and its peers are not there.

Everything but two things is the product's own: assembly, kernels, graphs, warm-up, memory plan and KV
mapping. The communicator does what a rank does for itself and takes what it gets from peers to be copies of
its own (``SimulatedPeers``). And weights are random numbers, written straight to where they lie on the
device: a checkpoint of such a model would take longer to write than all that is measured.
"""

import mmap
import random
from pathlib import Path
from queue import Empty, Queue

import torch

from benchmarks.random_weights import fill
from benchmarks.rank_on_gpu import CudaInstance
from models.layout import arena
from models.memory import MemoryPlan, StepLimits
from models.spec import ModelSpec
from protocol.control import Advance, Boot, NewRow, StepPlan, StepResult
from protocol.sampling import SamplingParams
from protocol.topology import Topology
from worker.assemble import RankLimits
from worker.backends.cuda.assemble import Assembled
from worker.backends.cuda.comm import CudaCommunicator
from worker.backends.cuda.completions import Completions
from worker.backends.cuda.device import Device
from worker.backends.cuda.memory import DeviceRange
from worker.boot import BootWork, Spans
from worker.layers.weights import Weights

AHEAD = 2
"""Steps of which a rank is told before it has answered."""


class SimulatedPeers(CudaCommunicator):
    """``Communicator`` of rank 0 of a group whose other ranks hold what this one holds.

    An all-reduce leaves what is there: a peer's part of a sum is no work of this rank. No tokens are dealt
    out: ranks with GPUs each have all of them (``deals_in_steps``). Holds the device memory that the plan
    charges for peers.
    """

    def __init__(self, topology: Topology, ordinal: int, num_bytes: int) -> None:
        assert topology.pp == topology.dcp == 1, topology
        super().__init__(0, topology)
        self._held: DeviceRange | None = None
        if num_bytes:
            self._held = DeviceRange(ordinal, num_bytes)
            self._held.map(0, self._held.size)

    @property
    def buffer_bytes(self) -> int:
        """See ``CudaCommunicator.buffer_bytes``."""
        return 0 if self._held is None else self._held.mapped_bytes

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` once for each rank."""
        return x.unsqueeze(0).repeat(self.topology.tp, *(1 for _ in x.shape))


class LoneRank:
    """Rank 0 of an instance, booted step by step in this process; the GPU is its own."""

    def __init__(
        self,
        spec: ModelSpec,
        topology: Topology,
        plan: MemoryPlan,
        limits: StepLimits,
        kernel_cache: Path,
        seed: int = 0,
    ) -> None:
        """Open the device, assemble the rank and draw its weights."""
        self.spec, self.topology, self.plan = spec, topology, plan
        rank = plan.ranks[0]
        self.spans = Spans(0)
        with self.spans.span("context"):
            self.device = Device.open(0, kernel_cache, rank.budget_bytes, is_alone=True)
        boot = _boot(spec, topology, plan, limits)
        self.limits = RankLimits.of(boot)
        held = arena(spec, topology, plan.stages, 0)
        charged = {line.name: line.predicted_bytes for line in rank.lines}
        with self.spans.span("build"), mmap.mmap(-1, mmap.PAGESIZE) as memory:
            work = BootWork(boot, spec, held, plan.stages, memory, self.spans, lambda: None)
            comm = SimulatedPeers(topology, 0, charged["communicator"])
            self.assembled = Assembled(work, self.device, comm)
        with self.spans.span("draw weights"):
            region = self.assembled._arena  # noqa: SLF001
            generator = torch.Generator(self.device.torch_device).manual_seed(seed)
            fill(Weights(held, topology, 0, region), held, generator)
            torch.cuda.synchronize()

    def warm_up(self) -> None:
        """See ``Assembled.warm_up``."""
        with self.spans.span("warm-up"):
            self.assembled.warm_up()

    def map_rest(self) -> int:
        """See ``Assembled.map_rest``."""
        with self.spans.span("map KV"):
            return self.assembled.map_rest()


def _boot(spec: ModelSpec, topology: Topology, plan: MemoryPlan, limits: StepLimits) -> Boot:
    rank = plan.ranks[0]
    return Boot(
        epoch=0,
        instance="lone-rank",
        rank=0,
        topology=topology,
        stages=[[layers.start, layers.stop] for layers in plan.stages],
        model_directory="",
        dtype=spec.dtype,
        device="cuda:0",
        arena_fds=[],
        kv_bytes=rank.block_bytes * plan.num_blocks,
        block_tokens=limits.block_tokens,
        num_blocks=plan.num_blocks,
        budget_bytes=rank.budget_bytes,
        device_ranks=1,
        kernel_cache="",
        max_rows=limits.max_rows,
        step_tokens=limits.step_tokens,
        logit_rows=limits.logit_rows,
        context=plan.context,
        threads=1,
        rendezvous="",
        collective_timeout_s=60.0,
    )


class Steps:
    """Owner of the rank's rows: makes plans for it, one after another."""

    def __init__(self, rank: LoneRank, num_blocks: int) -> None:
        self._rank, self._num_blocks = rank, num_blocks
        # Of other tokens this rank has no vectors, and without the peers' share all would be one token.
        self._vocab = -(-rank.spec.vocab_size // rank.topology.tp)
        self._draw = random.Random(0)
        self.instance = CudaInstance(rank.topology, rank.spec, rank.limits, rank.assembled, Queue())
        self._step = 0
        self._rows: list[NewRow] = []

    def room(self, rows: int) -> int:
        """Return the tokens that each of so many rows may hold."""
        blocks = self._num_blocks // (rows * len(self._rank.spec.kv_groups))
        return min(blocks * self._rank.limits.block_tokens, self._rank.limits.context)

    def begin(self, rows: int, prompt: int, room: int) -> None:
        """Run ``rows`` prompts, in steps as full as may be; a row may grow to ``room`` tokens."""
        blocks = -(-room // self._rank.limits.block_tokens)
        new = [self._row(slot, prompt, blocks) for slot in range(rows)]
        self._rows = list(new)
        left = [prompt] * rows
        while any(left):
            free, advances = self._rank.limits.step_tokens, list[Advance]()
            for slot in range(rows):
                taken = min(left[slot], free)
                if taken:
                    left[slot] -= taken
                    free -= taken
                    advances.append(Advance(slot, taken, None, wants_logits=not left[slot]))
            slots = {advance.slot for advance in advances}
            self._send([], [row for row in new if row.slot in slots], advances)
            new = [row for row in new if row.slot not in slots]
            self.instance.result()

    def decode(self, steps: int) -> StepResult | None:
        """Run decode steps of all rows, each planned while the one before runs; return the last answer."""
        sent, found = 0, None
        for done in range(steps):
            while sent < min(done + AHEAD, steps):
                advances = [Advance(row.slot, 1, None, wants_logits=True) for row in self._rows]
                self._send([], [], advances)
                sent += 1
            found = self.instance.result()
        return found

    def end(self) -> None:
        """Give all slots back."""
        self._send([row.slot for row in self._rows], [], [])
        self._rows = []
        self.instance.result()

    def recover(self) -> None:
        """Forget rows and answers that a failure has left."""
        runner = self._rank.assembled.runner
        torch.cuda.synchronize()
        runner.reset()
        self._rows = []
        # Its thread ends with the first answer that could not be read.
        if not runner._completions._thread.is_alive():  # noqa: SLF001
            runner._completions = Completions(self._rank.device.torch_device)  # noqa: SLF001
        try:
            while True:
                self.instance.results.get_nowait()
        except Empty:
            pass

    def chosen(self) -> dict[int, list[int]]:
        """Return how often each of the rank's experts was chosen so far, by layer."""
        return {one.layer: one.read() for one in self._rank.assembled.runner.expert_loads()}

    def _send(self, released: list[int], new: list[NewRow], advances: list[Advance]) -> None:
        self.instance.send(StepPlan(0, self._step, released, new, advances))
        self._step += 1

    def _row(self, slot: int, tokens: int, blocks: int) -> NewRow:
        groups = len(self._rank.spec.kv_groups)
        first = slot * blocks * groups
        tables = tuple(
            list(range(first + group * blocks, first + (group + 1) * blocks)) for group in range(groups)
        )
        ids = [self._draw.randrange(self._vocab) for _ in range(tokens)]
        # Drawn, so that rows do not all come to the same token, and with it to the same experts.
        params = SamplingParams(temperature=1.0, seed=slot)
        return NewRow(slot, ids, tokens, 0, tables, params, [], 0)
