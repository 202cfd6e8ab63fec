"""Streams read through the SDK in processes of their own, each token with its moment.

``python -P -m benchmarks.timed_streams ADDRESS`` is one such process: it takes its requests as a line of
JSON, says ``ready`` once it is connected, begins at the moment that the next line names and prints what it
saw. Processes, because one would be kept busy by 256 streams and its own delays would be measured.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypedDict

import uvloop

from benchmarks.token_times import StreamTimes
from tandem import AsyncClient

STREAMS_A_PROCESS = 64
START_S = 0.05
"""From the word to the first request: all processes hear it before."""


class Request(TypedDict):
    """One greedy request."""

    prompt_ids: list[int]
    max_tokens: int
    delay_s: float
    """After the common start."""
    is_background: bool
    """Ends with the others of its process, however many tokens it has had."""


def run_streams(
    address: str,
    requests: Sequence[Request],
    environment: dict[str, str],
    sample: Callable[[], None],
    limit_s: float,
) -> list[StreamTimes]:
    """Send requests from as many processes as they need and return what came, in their order.

    ``sample`` is called about every 5 ms from before the first request to after the last token.

    Errors: ``RuntimeError`` where a client fails, ``TimeoutExpired`` where one is not done in ``limit_s``.
    """
    count = -(-len(requests) // STREAMS_A_PROCESS)
    # Dealt out, so that each process has its part of the late ones.
    shares = [requests[number::count] for number in range(count)]
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(count))
        children = [stack.enter_context(_start(address, environment)) for _ in shares]
        stack.callback(_kill_all, children)
        for child, share in zip(children, shares, strict=True):
            assert child.stdin is not None
            child.stdin.write(json.dumps(share) + "\n")
            child.stdin.flush()
        for child in children:
            assert child.stdout is not None
            if child.stdout.readline() != "ready\n":
                raise RuntimeError("a client could not connect; it has said why on standard error")
        start_s = time.monotonic() + START_S
        sample()
        answers = [pool.submit(child.communicate, f"{start_s!r}\n", limit_s) for child in children]
        while not all(answer.done() for answer in answers):
            time.sleep(0.005)
            sample()
        found: list[StreamTimes | None] = [None] * len(requests)
        for number, (child, answer) in enumerate(zip(children, answers, strict=True)):
            printed, _ = answer.result()
            if child.returncode:
                raise RuntimeError("a client failed; it has said why on standard error")
            found[number::count] = [
                StreamTimes(one["sent_s"], tuple((moment, tokens) for moment, tokens in one["arrivals"]))
                for one in json.loads(printed)
            ]
    return [one for one in found if one is not None]


def _start(address: str, environment: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "benchmarks.timed_streams", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )


def _kill_all(children: "Sequence[subprocess.Popen[str]]") -> None:
    for child in children:
        child.kill()


async def _read(
    client: AsyncClient, request: Request, start_s: float, is_over: asyncio.Event
) -> dict[str, Any]:
    await asyncio.sleep(max(0.0, start_s + request["delay_s"] - time.monotonic()))
    arrivals: list[tuple[float, int]] = []
    stream = client.stream(
        prompt_ids=request["prompt_ids"],
        max_tokens=request["max_tokens"],
        temperature=0.0,
        ignore_eos=True,
    )
    sent_s = time.monotonic()
    while chunks := await stream.next_chunks():
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        if tokens:
            arrivals.append((time.monotonic(), tokens))
        if request["is_background"] and is_over.is_set():
            await stream.aclose()
    return {"sent_s": sent_s, "arrivals": arrivals}


async def _serve(address: str) -> list[dict[str, Any]]:
    requests: list[Request] = json.loads(sys.stdin.readline())
    async with AsyncClient(address=address) as client:
        await client.info()
        print("ready", flush=True)
        start_s = float(sys.stdin.readline())
        is_over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_read(client, one, start_s, is_over)) for one in requests]
            awaited = [t for t, one in zip(tasks, requests, strict=True) if not one["is_background"]]
            if awaited:
                await asyncio.wait(awaited)
            is_over.set()
        return [task.result() for task in tasks]


def main() -> None:
    """Print what was seen, in the order of the requests."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(_serve(sys.argv[1]))))


if __name__ == "__main__":
    main()
