"""Workers as the processes they are, over a real ROUTER and gloo, driven by a tiny orchestrator."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import zmq
from transformers import LlamaConfig, LlamaForCausalLM

from models.layout import arena, cut_stages
from models.registry import load_spec
from protocol.control import (
    Advance,
    Boot,
    Fault,
    FaultKind,
    FromWorker,
    Hello,
    NewRow,
    Progress,
    Ready,
    StepPlan,
    StepResult,
    Stop,
    ToWorker,
    from_worker_codec,
    to_worker_codec,
)
from protocol.sampling import SamplingParams
from protocol.topology import Topology
from tests.server import is_readable

EPOCH = 3
WAIT_S = 60.0
BLOCKS, BLOCK_TOKENS = 32, 4
MEMORY_LINES = {"runtime", "communicator", "weights", "kv cache", "activations", "workspace", "logits"}
T = TypeVar("T")


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


class Orchestrator:
    """A ROUTER and the processes of one instance. ``close`` leaves none behind."""

    def __init__(self, scratch: Path, directory: Path, topology: Topology) -> None:
        self.directory, self.topology, self.scratch = directory, topology, scratch
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.address = f"ipc://{scratch / 'workers.sock'}"
        self.socket.bind(self.address)
        self.encoder, self.decoder = to_worker_codec(), from_worker_codec()
        self.spec = load_spec(directory)
        self.stages = cut_stages(self.spec, topology, 1 << 30)
        self.fds = []
        for rank in range(topology.world_size):
            fd = os.memfd_create(f"arena-{rank}")
            os.ftruncate(fd, arena(self.spec, topology, self.stages, rank).size)
            self.fds.append(fd)
        self.workers: list[subprocess.Popen[bytes]] = []

    def command(self, rank: int) -> list[str]:
        python = [sys.executable, "-P", "-W", "error", "-m", "worker"]
        which = ["--rank", str(rank), "--epoch", str(EPOCH), "--parent", str(os.getpid())]
        return [*python, "--connect", self.address, *which]

    def start(self) -> None:
        for rank in range(self.topology.world_size):
            process = subprocess.Popen(self.command(rank), pass_fds=self.fds, cwd=self.scratch)
            self.workers.append(process)

    def boot(self, rank: int, **changes: object) -> Boot:
        fields = {
            "epoch": EPOCH,
            "instance": "test",
            "rank": rank,
            "topology": self.topology,
            "stages": [[layers.start, layers.stop] for layers in self.stages],
            "model_directory": str(self.directory),
            "dtype": "float32",
            "device": "cpu",
            "arena_fds": self.fds,
            "kv_bytes": 1 << 24,
            "block_tokens": BLOCK_TOKENS,
            "num_blocks": BLOCKS,
            "budget_bytes": 1 << 30,
            "device_ranks": 1,
            "kernel_cache": "",
            "max_rows": 4,
            "step_tokens": 32,
            "logit_rows": 4,
            "context": 64,
            "threads": 1,
            "rendezvous": str(self.scratch / "rendezvous"),
            "collective_timeout_s": 30.0,
        }
        return Boot(**(fields | changes))  # type: ignore[arg-type]

    def send(self, rank: int, message: ToWorker) -> None:
        self.socket.send_multipart([str(rank).encode(), self.encoder.encode(message)])

    def send_all(self, message: ToWorker) -> None:
        for rank in range(self.topology.world_size):
            self.send(rank, message)

    def receive(self) -> tuple[int, FromWorker]:
        assert self.socket.poll(WAIT_S * 1000), "no worker said anything"
        identity, frame = self.socket.recv_multipart()
        return int(identity.rstrip(b"+")), self.decoder.decode(frame)

    def collect(self, kind: type[T], count: int) -> dict[int, T]:
        found: dict[int, T] = {}
        while len(found) < count:
            rank, message = self.receive()
            if isinstance(message, kind):
                found[rank] = message
            else:
                assert isinstance(message, Progress), message
        return found

    def bring_up(self) -> dict[int, Ready]:
        self.start()
        world = self.topology.world_size
        for rank, hello in self.collect(Hello, world).items():
            assert (hello.epoch, hello.rank, hello.pid) == (EPOCH, rank, self.workers[rank].pid)
            self.send(rank, self.boot(rank))
        return self.collect(Ready, world)

    def exit_codes(self) -> list[int]:
        return [worker.wait(WAIT_S) for worker in self.workers]

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait(WAIT_S)
        for fd in self.fds:
            os.close(fd)
        self.socket.close()
        self.context.term()


@pytest.fixture
def orchestrator(model_directory: Path, tmp_path: Path) -> Iterator[Callable[[Topology], Orchestrator]]:
    made: list[Orchestrator] = []

    def make(topology: Topology) -> Orchestrator:
        made.append(Orchestrator(tmp_path, model_directory, topology))
        return made[-1]

    yield make
    for one in made:
        one.close()


def new_row(prompt: list[int], slot: int = 0, block: int = 0) -> NewRow:
    blocks = [block + i for i in range(8)]
    sampling = SamplingParams(temperature=0.0, seed=0)
    return NewRow(slot, prompt, len(prompt), 0, (blocks,), sampling, [], 0)


def greedy(directory: Path, prompt: list[int], count: int) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(directory)
    known = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(prompt) :]


@pytest.mark.parametrize("topology", [Topology(2, 1), Topology(1, 2)], ids=str)
def test_two_processes_answer_and_stop(
    orchestrator: Callable[[Topology], Orchestrator], topology: Topology
) -> None:
    us = orchestrator(topology)
    for rank, ready in us.bring_up().items():
        assert {line.name for line in ready.memory} <= MEMORY_LINES
        assert {"runtime", "weights", "kv cache"} <= {line.name for line in ready.memory}
        names = {span.name for span in ready.spans}
        assert {"import torch", "connect", "load", "warm-up"} <= names
        assert all(span.rank == rank and span.end_s >= span.start_s for span in ready.spans)
        assert 0 < ready.step_seconds_fixed < 5
        assert 0 < ready.step_seconds_per_token < 1
        title = Path(f"/proc/{us.workers[rank].pid}/cmdline").read_bytes()
        assert title.rstrip(b"\0").decode() == f"tandem: test worker {rank + 1}/2"
    prompt = [5, 9, 2, 77, 31]
    us.send_all(StepPlan(EPOCH - 1, 0, [3], [], []))  # another epoch's: dropped
    us.send_all(StepPlan(EPOCH, 0, [], [new_row(prompt)], [Advance(0, 5, None, True)]))
    # Planned before its token is known: the ranks keep it among themselves.
    for step in range(1, 6):
        us.send_all(StepPlan(EPOCH, step, [], [], [Advance(0, 1, None, True)]))
    token_ids = []
    for step in range(6):
        rank, result = us.receive()
        assert isinstance(result, StepResult), result
        assert (rank, result.epoch, result.step) == (topology.sampling_rank, EPOCH, step)
        assert result.step_s > 0
        token_ids += result.token_ids[0]
    assert token_ids == greedy(us.directory, prompt, 6)
    for worker in us.workers:
        worker.send_signal(signal.SIGINT)  # a terminal's Ctrl-C is not for workers
    us.send_all(Stop(EPOCH))
    assert us.exit_codes() == [0, 0]


def test_a_plan_that_cannot_be_right_is_a_fault(orchestrator: Callable[[Topology], Orchestrator]) -> None:
    us = orchestrator(Topology(1, 1))
    us.bring_up()
    us.send(0, StepPlan(EPOCH, 0, [], [], [Advance(2, 1, None, True)]))
    _, fault = us.receive()
    assert isinstance(fault, Fault)
    assert (fault.epoch, fault.rank, fault.kind, fault.code) == (EPOCH, 0, FaultKind.PROTOCOL, "protocol")
    assert fault.message == "step 0: slot 2 advances and holds no row"
    assert us.exit_codes() == [1]


def test_a_step_that_raises_is_a_fault(orchestrator: Callable[[Topology], Orchestrator]) -> None:
    us = orchestrator(Topology(1, 2))
    us.bring_up()
    # Only the first stage is told: its peer's silence is not its error, its peer's end is.
    plan = StepPlan(EPOCH, 0, [], [new_row([1, 2, 3])], [Advance(0, 3, None, True)])
    us.workers[0].kill()
    us.workers[0].wait(WAIT_S)
    us.send(1, plan)
    rank, fault = us.receive()
    assert isinstance(fault, Fault)
    assert (rank, fault.kind) == (1, FaultKind.STEP)
    assert us.workers[1].wait(WAIT_S) == 1


def test_a_model_that_is_not_there_is_a_load_fault(
    orchestrator: Callable[[Topology], Orchestrator], tmp_path: Path
) -> None:
    us = orchestrator(Topology(1, 1))
    us.start()
    us.collect(Hello, 1)
    us.send(0, us.boot(0, model_directory=str(tmp_path / "nowhere")))
    _, fault = us.receive()
    assert isinstance(fault, Fault)
    assert (fault.kind, fault.code) == (FaultKind.LOAD, "storage")
    assert "nowhere" in fault.message
    assert us.exit_codes() == [1]


def test_bytes_that_are_no_message_are_a_fault(orchestrator: Callable[[Topology], Orchestrator]) -> None:
    us = orchestrator(Topology(1, 1))
    us.start()
    us.collect(Hello, 1)
    us.socket.send_multipart([b"0", b"\x01\xc1\xc1"])
    _, fault = us.receive()
    assert isinstance(fault, Fault)
    assert fault.code == "protocol"
    assert us.exit_codes() == [1]


PARENT = """
import os, subprocess, sys
command = [*sys.argv[2:], "--parent", str(os.getpid())]
child = subprocess.Popen(command, pass_fds=[int(fd) for fd in sys.argv[1].split(",")])
child.wait()
"""


@pytest.mark.parametrize("moment", ["spawned", "ready"])
def test_a_worker_ends_with_its_parent(
    orchestrator: Callable[[Topology], Orchestrator], moment: str
) -> None:
    us = orchestrator(Topology(1, 1))
    fds = ",".join(map(str, us.fds))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, fds, *us.command(0)], pass_fds=us.fds)
    us.workers.append(parent)
    pid = us.collect(Hello, 1)[0].pid
    worker = os.pidfd_open(pid)
    try:
        if moment == "ready":
            us.send(0, us.boot(0))
            us.collect(Ready, 1)
        parent.kill()
        began_s = time.monotonic()
        assert is_readable(worker, 2.0), "the worker outlived its parent"
        assert time.monotonic() - began_s < 2.0
    finally:
        os.close(worker)
