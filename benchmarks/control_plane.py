"""What does the control plane cost: the orchestrator's CPU per token, and a step's planning?

The real gateway, engine, scheduler, KV manager, transport, supervisor and detokeniser in this process, as
``serve`` puts them together; ranks that answer at once in a second one, streams read through the SDK in a
third. No model is run, so that nothing but the control plane is measured.

    python -m benchmarks.control_plane [--rows 1 64 256] [--ranks 8] [--connections 1] [--json [FILE]]

``cpu_us_per_token``: CPU of this whole process (user and system, ZeroMQ's thread included) from the first
request's arrival to the last one's end, by the tokens that came. ``step_us``: commit, plan and send of one
step. ``idle_percent``: CPU of one core while no request runs. Exit code 1 where a demand is missed.
"""

import argparse
import asyncio
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.stream_clients import PROMPT_TOKENS
from kv.manager import KVManager
from loader import hub
from models.spec import KVGroup
from orchestrator.config import Deadlines
from orchestrator.engine import Engine
from orchestrator.gateway import Gateway
from orchestrator.launcher import LaunchOrder, LocalProcess, rank_environment, start_process
from orchestrator.ranks import RankEvents, Ranks
from orchestrator.request import RequestOutput
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.supervisor import StepClock
from orchestrator.text import TextService
from protocol.client import Info
from protocol.control import Boot, StepPlan, StepResult
from protocol.topology import Topology

EPOCH = 1
BLOCK_TOKENS = 16
IDLE_S = 5.0
DEMANDS = {"cpu_us_per_token": 12.0, "step_us": 1000.0, "idle_percent": 1.0}
"""At 256 rows; idle always. The aims are 8 µs and 500 µs."""


class TimedScheduler(Scheduler):
    """Adds up what planning and committing take, step by step."""

    spent_s = 0.0
    """In this step so far; sending is added from outside."""

    def __init__(self, config: SchedulerConfig, kv: KVManager) -> None:
        super().__init__(config, kv)
        self.step_s: list[float] = []

    def plan(self, now: float) -> StepPlan | None:
        """Plan, timed."""
        began = time.perf_counter()
        plan = super().plan(now)
        self.spent_s += time.perf_counter() - began
        return plan

    def commit(self, result: StepResult) -> list[RequestOutput]:
        """Commit, timed; what came before belongs to the step before."""
        self.step_s.append(self.spent_s)
        began = time.perf_counter()
        outputs = super().commit(result)
        self.spent_s = time.perf_counter() - began
        return outputs


class OneProcess:
    """A launcher of ranks that share a process."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def launch(self, order: LaunchOrder) -> list[LocalProcess]:
        """Start the one process."""
        command = [sys.executable, "-P", "-m", "benchmarks.instant_ranks"]
        command += ["--ranks", str(order.world_size), "--vocabulary", str(self._vocabulary)]
        command += ["--connect", order.address, "--epoch", str(order.epoch)]
        return [start_process(tuple(range(order.world_size)), command, order)]


def cpu_s() -> float:
    """Return this process's CPU seconds, all its threads'."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def boots(ranks: int, max_rows: int) -> list[Boot]:
    """Return what the ranks are told; they look at the topology alone."""
    return [
        Boot(
            epoch=EPOCH,
            instance="benchmark",
            rank=rank,
            topology=Topology(tp=ranks),
            stages=[[0, 1]],
            model_directory="/",
            dtype="float32",
            device="cpu",
            arena_fds=[],
            kv_bytes=0,
            block_tokens=BLOCK_TOKENS,
            num_blocks=1,
            budget_bytes=0,
            device_ranks=ranks,
            kernel_cache="",
            max_rows=max_rows,
            step_tokens=max_rows,
            logit_rows=1,
            context=1,
            threads=1,
            rendezvous="/",
            collective_timeout_s=1.0,
        )
        for rank in range(ranks)
    ]


def make_info(ranks: int, max_rows: int, vocabulary: int, context: int) -> Info:
    """Return what clients are told."""
    return Info(
        id="",
        instance="benchmark",
        model="none",
        architecture="none",
        state="ready",
        tp=ranks,
        pp=1,
        dtype="float32",
        context=context,
        vocab_size=vocabulary,
        kv_tokens=0,
        max_rows=max_rows,
        has_tokenizer=True,
        has_chat_template=False,
        memory=[],
    )


class Bench:
    """One instance around ranks that answer at once."""

    def __init__(self, directory: Path, model: Path, ranks: int, rows: int, max_tokens: int) -> None:
        self._directory, self._model = directory, model
        self._ranks, self._rows, self._max_tokens = ranks, rows, max_tokens
        self.address = f"ipc://{directory}/gateway.sock"
        context = PROMPT_TOKENS + max_tokens
        # Room for all rows, half as much again for what prefix blocks stay cached.
        num_blocks = rows * (-(-context // BLOCK_TOKENS)) * 3 // 2 + 64
        kv = KVManager(num_blocks, BLOCK_TOKENS, (KVGroup("full", (0,), 1, 1, 1, "float32"),))
        step_tokens = max(rows, 512)
        self.scheduler = TimedScheduler(SchedulerConfig(EPOCH, rows, step_tokens, context, 1, rows), kv)
        self._context = context

    async def measure(self, connections: int, idle_s: float) -> dict[str, Any]:
        """Boot, look at it idle, then serve the streams; return the figures."""
        async with AsyncExitStack() as stack:
            text = await TextService.start(self._model, prestart=False)
            stack.push_async_callback(text.close)
            vocabulary = int(json.loads((self._model / "config.json").read_text())["vocab_size"])
            engine, lost = await self._boot(stack, vocabulary)
            gateway = Gateway(
                self.address,
                engine,
                text,
                make_info(self._ranks, self._rows, vocabulary, self._context),
            )
            await gateway.open()
            stack.callback(gateway.close)
            serving = asyncio.create_task(engine.run())
            idle = await self._idle(idle_s)
            figures = await self._serve(connections)
            engine.drain()
            await serving
            assert not lost, lost
        return {**figures, "idle_percent": idle}

    async def _boot(self, stack: AsyncExitStack, vocabulary: int) -> tuple[Engine, list[Any]]:
        engines: list[Engine] = []
        lost: list[Any] = []
        events = RankEvents(
            on_result=lambda result: engines[0].on_result(result),
            on_lost=lambda fault: (lost.append(fault), engines[0].on_lost(fault)),
            on_load=lambda _: None,
            on_progress=lambda _: None,
            on_output=lambda _, line: print(line, file=sys.stderr),
        )
        environment = rank_environment(dict(os.environ), 1)
        # Found from anywhere: the ranks start in the file system's root.
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        order = LaunchOrder(f"ipc://{self._directory}/workers.sock", EPOCH, self._ranks, (), environment)
        deadlines = Deadlines()
        ranks = Ranks(OneProcess(vocabulary), order, boots(self._ranks, self._rows), deadlines, events)
        await stack.enter_async_context(ranks)
        ready = await ranks.boot()
        scheduler = self.scheduler

        def send(plan: StepPlan) -> None:
            began = time.perf_counter()
            ranks.send(plan)
            scheduler.spent_s += time.perf_counter() - began

        engines.append(Engine(scheduler, send, StepClock(ready, deadlines)))
        return engines[0], lost

    async def _idle(self, seconds: float) -> float:
        await asyncio.sleep(0.2)
        began, used = time.monotonic(), cpu_s()
        await asyncio.sleep(seconds)
        return (cpu_s() - used) / (time.monotonic() - began) * 100

    async def _serve(self, connections: int) -> dict[str, Any]:
        clients = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "benchmarks.stream_clients", self.address),
            *("--connections", str(connections), "--streams", str(self._rows)),
            *("--max-tokens", str(self._max_tokens)),
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=asyncio.subprocess.PIPE,
        )
        began, used = time.monotonic(), cpu_s()
        try:
            printed, _ = await asyncio.wait_for(clients.communicate(), 300)
        finally:
            if clients.returncode is None:
                clients.kill()
                await clients.wait()
        used, took_s = cpu_s() - used, time.monotonic() - began
        tokens = int(printed)
        assert tokens == self._rows * self._max_tokens, (tokens, self._rows, self._max_tokens)
        step_us = [seconds * 1e6 for seconds in self.scheduler.step_s[1:]]
        return {
            "rows": self._rows,
            "ranks": self._ranks,
            "connections": connections,
            "tokens": tokens,
            "steps": len(step_us),
            "cpu_us_per_token": used / tokens * 1e6,
            "step_us": {
                "median": statistics.median(step_us),
                "p99": statistics.quantiles(step_us, n=100)[98],
            },
            "tokens_per_s": tokens / took_s,
        }


def measure(
    model: Path, ranks: int, rows: int, connections: int, max_tokens: int, idle_s: float = IDLE_S
) -> dict[str, Any]:
    """Measure one instance."""
    with tempfile.TemporaryDirectory(prefix="tandem-") as directory:
        bench = Bench(Path(directory), model, ranks, rows, max_tokens)
        gc.collect()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(bench.measure(connections, idle_s))


def missed(found: dict[str, Any]) -> list[str]:
    """Return the demands that a measurement does not meet."""
    values: dict[str, Callable[[], float]] = {"idle_percent": lambda: found["idle_percent"]}
    if found["rows"] == 256:
        values["cpu_us_per_token"] = lambda: found["cpu_us_per_token"]
        values["step_us"] = lambda: found["step_us"]["median"]
    return [
        f"{name} {get():.2f} > {DEMANDS[name]:g}" for name, get in values.items() if get() > DEMANDS[name]
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the figures for people."""
    head = ("rows", "µs CPU/token", "step µs median", "p99", "tokens/s", "idle %")
    rows = [
        (
            str(f["rows"]),
            f"{f['cpu_us_per_token']:.1f}",
            f"{f['step_us']['median']:.0f}",
            f"{f['step_us']['p99']:.0f}",
            f"{f['tokens_per_s']:.0f}",
            f"{f['idle_percent']:.2f}",
        )
        for f in found
    ]
    return "\n".join("".join(cell.rjust(16) for cell in row) for row in (head, *rows))


def main() -> None:
    """Print a table, or JSON: one object where one number of rows was asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer is used")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    options = parser.parse_args()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem"
    model = hub.pull(options.model, cache)
    found = [
        measure(model, options.ranks, rows, options.connections, options.max_tokens)
        for rows in options.rows
    ]
    answer = json.dumps(found[0] if len(found) == 1 else found, indent=1)
    if options.json == "-":
        print(answer)
    else:
        print(table(found))
        if options.json:
            Path(options.json).write_text(answer + "\n")
    failures = [text for one in found for text in missed(one)]
    if failures:
        sys.exit(f"missed: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
