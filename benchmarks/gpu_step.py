"""Where does a decode step's time go on a GPU, and is the device ever idle between two of them?

One rank in this process, without orchestrator, sockets and text: steps of several shapes, then rows of 128
tokens that decode, planned one step ahead, as the engine does. The device's own clock (events round each
graph replay) times a step and the gap before the next; the profiler, in a run of its own, names kernels.

    python -m benchmarks.gpu_step --model /dev/shm/llama-3-8b [--rows 1 8 64 256] [--json FILE]
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.rank_on_gpu import CudaInstance, cuda_instance
from protocol.control import Advance, NewRow, StepPlan
from protocol.sampling import SamplingParams
from worker.backends.cuda.graphs import StepKind

PROMPT_TOKENS = 128
STEPS = 64
PROFILED = 4
BLOCK_TOKENS = 64
AHEAD = 2


class Rows:
    """So many rows that decode together."""

    def __init__(self, instance: CudaInstance, rows: int, first_step: int) -> None:
        self._instance, self._rows, self._step = instance, rows, first_step
        self._blocks = -(-(PROMPT_TOKENS + 2 * STEPS + 8) // BLOCK_TOKENS)

    def prefill(self) -> None:
        """Run the prompts, as many at a time as a step takes."""
        draw = random.Random(self._rows)
        limits, vocab = self._instance.limits, self._instance.spec.vocab_size
        at_once = max(limits.step_tokens // PROMPT_TOKENS, 1)
        for first in range(0, self._rows, at_once):
            slots = range(first, min(first + at_once, self._rows))
            new = [self._row(slot, [draw.randrange(vocab) for _ in range(PROMPT_TOKENS)]) for slot in slots]
            self._send([Advance(slot, PROMPT_TOKENS, None, wants_logits=True) for slot in slots], new)
            self._instance.result()

    def decode(self, steps: int) -> float:
        """Run decode steps, each planned while the one before runs; return the seconds of one."""
        sent = 0
        began_s = time.perf_counter()
        for done in range(steps):
            while sent < min(done + AHEAD, steps):
                self._send([Advance(slot, 1, None, wants_logits=True) for slot in range(self._rows)], [])
                sent += 1
            self._instance.result()
        return (time.perf_counter() - began_s) / steps

    def release(self) -> int:
        """Give the slots back; return the next step's number."""
        plan = StepPlan(0, self._step, list(range(self._rows)), [], [])
        self._instance.send(plan)
        self._instance.result()
        return self._step + 1

    def _send(self, advances: list[Advance], new: list[NewRow]) -> None:
        self._instance.send(StepPlan(0, self._step, [], new, advances))
        self._step += 1

    def _row(self, slot: int, token_ids: list[int]) -> NewRow:
        blocks = list(range(slot * self._blocks, (slot + 1) * self._blocks))
        params = SamplingParams(temperature=0.0, seed=0)
        return NewRow(slot, token_ids, len(token_ids), 0, (blocks,), params, [], 0)


class Replays:
    """Events before and after each graph replay of a runner."""

    def __init__(self, instance: CudaInstance) -> None:
        self._graphs = instance.assembled.runner._graphs  # noqa: SLF001
        self._run = self._graphs.run
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> "Replays":
        self._graphs.run = self._timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._graphs.run = self._run  # type: ignore[method-assign]

    def _timed(self, size: int, kind: StepKind) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        self._run(size, kind)
        after.record()
        self._events.append((before, after))

    def figures(self) -> dict[str, float]:
        """Return the medians of a replay and of the gap to the next one, ms, without the first few."""
        torch.cuda.synchronize()
        kept = self._events[4:]
        replay = [a.elapsed_time(b) for a, b in kept]
        gaps = [before[1].elapsed_time(after[0]) for before, after in pairwise(kept)]
        step = [a[0].elapsed_time(b[0]) for a, b in pairwise(kept)]
        return {
            "replay_ms": statistics.median(replay),
            "gap_ms": statistics.median(gaps),
            "device_step_ms": statistics.median(step),
            "idle_share": sum(gaps) / sum(step),
        }


def run_alone(instance: CudaInstance, lengths: list[int], step: int) -> tuple[float, int]:
    """Run one step of new rows of these lengths; return its seconds, plans and answers included."""
    draw, new, first = random.Random(1), [], 0
    for slot, tokens in enumerate(lengths):
        blocks = list(range(first, first - (-tokens // BLOCK_TOKENS)))
        first += len(blocks)
        ids = [draw.randrange(instance.spec.vocab_size) for _ in range(tokens)]
        new.append(NewRow(slot, ids, tokens, 0, (blocks,), SamplingParams(temperature=0.0, seed=0), [], 0))
    advances = [Advance(row.slot, len(row.token_ids), None, wants_logits=True) for row in new]
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    instance.send(StepPlan(0, step, [], new, advances))
    queued_s = time.perf_counter() - began_s
    instance.result()
    took_s = time.perf_counter() - began_s
    print(
        f"{lengths[:4]} …, {sum(lengths)} tokens: {took_s * 1e3:.2f} ms, queued in {queued_s * 1e3:.2f} ms"
    )
    instance.send(StepPlan(0, step + 1, [row.slot for row in new], [], []))
    instance.result()
    return took_s, step + 2


def prefill_all(instance: CudaInstance, step: int) -> tuple[float, int]:
    """Run four prompts of 7000 tokens in full steps, each queued while the one before runs."""
    draw, prompts, tokens = random.Random(2), 4, 7000
    blocks = -(-tokens // BLOCK_TOKENS)
    left = [tokens] * prompts
    sent = 0
    new = [
        NewRow(
            slot,
            [draw.randrange(instance.spec.vocab_size) for _ in range(tokens)],
            tokens,
            0,
            (list(range(slot * blocks, (slot + 1) * blocks)),),
            SamplingParams(temperature=0.0, seed=0),
            [],
            0,
        )
        for slot in range(prompts)
    ]
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    while any(left):
        room, advances = instance.limits.step_tokens, []
        for slot in range(prompts):
            taken = min(left[slot], room)
            if taken:
                left[slot] -= taken
                room -= taken
                advances.append(Advance(slot, taken, None, wants_logits=not left[slot]))
        begun = [row for row in new if row.slot in {a.slot for a in advances}]
        new = [row for row in new if row not in begun]
        instance.send(StepPlan(0, step, [], begun, advances))
        step, sent = step + 1, sent + 1
    for _ in range(sent):
        instance.result()
    took_s = time.perf_counter() - began_s
    instance.send(StepPlan(0, step, list(range(prompts)), [], []))
    instance.result()
    return prompts * tokens / took_s, step + 1


def kernels(work: Callable[[], object], times: int) -> list[dict[str, Any]]:
    """Return what the device runs, by kernel, most time first, of work that does it so many times."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    total: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type.name == "CUDA":
            total[event.name].append(event.device_time)
    found = [
        {"kernel": name[:90], "launches": len(took) / times, "us": sum(took) / times}
        for name, took in total.items()
    ]
    return sorted(found, key=lambda one: -float(one["us"]))


def measure(model: Path, sizes: list[int], cache: Path | None, dtype: str) -> Iterator[dict[str, Any]]:
    """Measure each number of rows in turn."""
    blocks = max(sizes) * 5 + 260
    with cuda_instance(
        model,
        dtype=dtype,
        max_rows=max(sizes),
        step_tokens=8448,
        num_blocks=blocks,
        block_tokens=BLOCK_TOKENS,
        context=8192,
        kernel_cache=cache,
    ) as instance:
        step = 0
        instance.assembled.runner.reset()
        for lengths in ([32] + [1] * 31, [256] + [1] * 31, [512] + [1] * 31, [7000, 1448]):
            for _ in range(3):
                _, step = run_alone(instance, lengths, step)

        for _ in range(3):
            tokens_per_s, step = prefill_all(instance, step)
            print(f"4 x 7000 tokens, engine only: {tokens_per_s:,.0f} tokens/s")

        def prefill() -> None:
            nonlocal step
            _, step = prefill_all(instance, step)

        yield {"prefill": kernels(prefill, 1)}
        for size in sizes:
            rows = Rows(instance, size, step)
            rows.prefill()
            rows.decode(8)
            with Replays(instance) as replays:
                step_s = rows.decode(STEPS)
            found = kernels(lambda rows=rows: rows.decode(PROFILED), PROFILED)  # type: ignore[misc]
            step = rows.release()
            yield {"rows": size, "step_ms": step_s * 1e3, **replays.figures(), "kernels": found}


def main() -> None:
    """Print a table for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kernels", type=Path, help="the kernel cache; without it all are compiled")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--top", type=int, default=14, help="kernels to name")
    options = parser.parse_args()
    everything = []
    for one in measure(options.model, options.rows, options.kernels, options.dtype):
        everything.append(one)
        if "prefill" in one:
            for kernel in one["prefill"][: options.top]:
                print(f"  {kernel['us']:9.1f} us {kernel['launches']:6.1f} x  {kernel['kernel']}")
            continue
        print(
            f"{one['rows']} rows: step {one['step_ms']:.3f} ms, replay {one['replay_ms']:.3f}, gap "
            f"{one['gap_ms'] * 1e3:.1f} us, idle {one['idle_share'] * 100:.2f} %"
        )
        for kernel in one["kernels"][: options.top]:
            print(f"  {kernel['us']:9.1f} us {kernel['launches']:6.1f} x  {kernel['kernel']}")
    if options.json:
        options.json.write_bytes(msgspec.json.encode(everything))


if __name__ == "__main__":
    main()
