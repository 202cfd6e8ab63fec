"""A worker of which one rank does something wrong: ``python -m tests.faults.bad_worker WRONG --connect …``.

``WRONG`` is ``DEED:RANK`` or ``DEED:RANK:STEP``; what it says on standard error when it does it carries the
machine's monotonic clock, so that a test can tell how long others took to see it.
"""

import dataclasses
import runpy
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import worker.boot as boot_module
import worker.control as control_module
from loader.plan import LoadPlan
from loader.reader import LoadReport, ProgressCallback, load
from protocol.control import Boot, StepPlan
from worker.boot import Booted, Send, boot_rank

if TYPE_CHECKING:
    from worker.steps import Answer, StepRunner

SAID = "does wrong at"


class StepError(Exception):
    """What a step raises."""

    WORDS = "the ninth bit is set"


def say() -> None:
    print(f"{SAID} {time.monotonic()}", file=sys.stderr, flush=True)


def hang() -> NoReturn:
    say()
    while True:
        threading.Event().wait()


class BadRunner:
    """A runner that does wrong in one step, and as it should in all others."""

    def __init__(self, runner: "StepRunner", deed: str, step: int) -> None:
        self._runner, self._deed, self._step = runner, deed, step

    def step(self, plan: StepPlan, answer: "Answer") -> None:
        if plan.step == self._step:
            match self._deed:
                case "hang":
                    hang()
                case "hang-deaf":
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    hang()
                case "raise":
                    say()
                    raise StepError(StepError.WORDS)
        self._runner.step(plan, answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def pause_load(
    plan: LoadPlan, rank: int, arenas: Mapping[int, memoryview], on_progress: ProgressCallback
) -> LoadReport:
    """Read a part, then no more."""

    def pause(done_bytes: int) -> None:
        on_progress(done_bytes)
        hang()

    return load(plan, rank, arenas, on_progress=pause)


def do_wrong(deed: str, step: int) -> None:
    if deed == "pause-load":
        boot_module.load = pause_load  # type: ignore[attr-defined, assignment]
        return

    def boot_badly(boot: Boot, send: Send) -> Booted:
        booted = boot_rank(boot, send)
        runner: Any = BadRunner(booted.runner, deed, step)
        return dataclasses.replace(booted, runner=runner)

    control_module.boot_rank = boot_badly  # type: ignore[attr-defined]


if __name__ == "__main__":
    deed, rank, *step = sys.argv.pop(1).split(":")
    if sys.argv[sys.argv.index("--rank") + 1] == rank:
        do_wrong(deed, int(step[0]) if step else -1)
    runpy.run_module("worker", run_name="__main__", alter_sys=True)
