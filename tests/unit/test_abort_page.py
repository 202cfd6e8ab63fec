"""The abort page: made for GPU ranks alone, inherited by them, written before a signal, and closed."""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path

import pytest

import orchestrator.budget
from orchestrator.config import Deadlines, ServeConfig
from orchestrator.display import make_display
from orchestrator.instance import Blueprint
from orchestrator.launcher import LaunchOrder, LocalProcess, RankProcess, rank_environment, start_process
from orchestrator.serve import serve
from orchestrator.supervisor import Supervisor
from protocol.abort_page import PAGE_BYTES, make_page, write_abort
from protocol.control import Fault, FaultKind
from protocol.errors import InstanceFailedError
from tests.tiny_llama import write_tiny_llama

SAW_IT = 7
DEAF = f"""
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
fd = int(sys.argv[1])
sys.stderr.write("ready\\n")
sys.stderr.flush()
while not os.pread(fd, 4, 0)[0]:
    time.sleep(0.001)
os._exit({SAW_IT})
"""
"""A rank that no signal but SIGKILL ends, only the page."""


@pytest.fixture
def page() -> Iterator[int]:
    fd = make_page()
    yield fd
    os.close(fd)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    # A socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="td-") as path:
        yield Path(path)


def word(fd: int) -> int:
    return int.from_bytes(os.pread(fd, 4, 0), "little")


def test_a_page_is_zeros_until_the_word_is_written(page: int) -> None:
    assert os.pread(page, PAGE_BYTES + 1, 0) == bytes(PAGE_BYTES)
    assert not os.get_inheritable(page)
    write_abort(page)
    assert word(page) == 1
    assert os.pread(page, PAGE_BYTES, 4) == bytes(PAGE_BYTES - 4)


def start(page: int, count: int) -> list[LocalProcess]:
    order = LaunchOrder("", 1, count, (page,), {"PATH": os.environ["PATH"]})
    return [start_process((rank,), (sys.executable, "-c", DEAF, str(page)), order) for rank in range(count)]


@pytest.mark.parametrize("dies", [True, False])
def test_it_is_written_before_anyone_is_told_or_signalled(page: int, dies: bool) -> None:
    async def run() -> tuple[list[tuple[Fault, int]], dict[int, int]]:
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lost: list[tuple[Fault, int]] = []
        ready: set[int] = set()
        all_ready = asyncio.Event()

        def on_lost(fault: Fault) -> None:
            lost.append((fault, word(page)))
            told.set_result(None)

        def on_output(ranks: tuple[int, ...], line: str) -> None:
            ready.update(ranks)
            if len(ready) == len(processes):
                all_ready.set()

        processes = start(page, 3)
        deadlines = Deadlines(kill_grace_s=20.0)
        supervisor = Supervisor(processes, 1, deadlines, on_lost=on_lost, on_output=on_output, page_fd=page)
        try:
            await asyncio.wait_for(all_ready.wait(), 20.0)
            assert word(page) == 0
            if dies:
                os.kill(supervisor.pids[1], signal.SIGKILL)
                await asyncio.wait_for(told, 5.0)
        finally:
            statuses = await supervisor.end(politely=False)
        return lost, statuses

    lost, statuses = asyncio.run(run())
    if dies:
        ((fault, written),) = lost
        assert (fault.rank, fault.kind, written) == (1, FaultKind.DIED, 1)
    # SIGTERM ends nobody here: those who lived saw the page.
    assert statuses == {0: SAW_IT, 1: -signal.SIGKILL if dies else SAW_IT, 2: SAW_IT}


class Refuses:
    """A launcher that looks at the order and starts nothing."""

    def __init__(self) -> None:
        self.order: LaunchOrder | None = None
        self.pages: list[int] = []

    def launch(self, order: LaunchOrder) -> Sequence[RankProcess]:
        self.order = order
        self.pages = [fd for fd in order.inherited_fds if is_page(fd)]
        raise InstanceFailedError("nothing is started here")


def is_page(fd: int) -> bool:
    try:
        return "abort-page" in str(Path(f"/proc/self/fd/{fd}").readlink())
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("device", "tp", "pages"), [("cpu", 2, 0), ("cuda:0", 1, 0), ("cuda:0", 2, 1), ("cuda:0", 4, 1)]
)
def test_gpu_ranks_that_have_peers_inherit_one(
    tmp_path: Path,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    tp: int,
    pages: int,
) -> None:
    monkeypatch.setattr(orchestrator.budget, "free_bytes", lambda device, environment: 16 << 30)
    config = ServeConfig.for_devices(
        devices=(device,),
        name="m",
        model=write_tiny_llama(tmp_path / "model", heads=4, kv_heads=4),
        runtime_root=run_dir,
        environment={},
        tp=tp,
        dtype="float32",
        memory_bytes=None if device == "cpu" else 16 << 30,
    )
    launcher = Refuses()
    said = StringIO()
    assert asyncio.run(serve(config, make_display(said, None, colour=False), launcher)) == 1
    assert launcher.order is not None, said.getvalue()
    assert len(launcher.pages) == pages
    assert len(launcher.order.inherited_fds) == tp + pages
    assert not any(is_page(fd) for fd in launcher.pages)
    boots = Blueprint.of(config).boots(1, [], tmp_path, 5)
    assert [boot.page_fd for boot in boots] == [5] * tp


def test_a_rank_is_told_how_nccl_takes_its_buffers() -> None:
    assert rank_environment({}, 1)["NCCL_BUFFSIZE"] == "1048576"
    assert rank_environment({}, 1)["NCCL_NVLS_ENABLE"] == "0"
    assert rank_environment({"NCCL_NVLS_ENABLE": "1"}, 1)["NCCL_NVLS_ENABLE"] == "1"
