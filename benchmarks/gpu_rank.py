"""What does one rank of a large model do with its GPU, before there are GPUs for all of them?

Rank 0 of the asked layout runs alone in this process, with random weights that are drawn on the device (no
checkpoint is read) and peers that are not there (``benchmarks.lone_rank``); its budget is that of an 80 GB
GPU unless ``--memory`` says otherwise. It boots as a rank does, and its memory is held against the plan.
Then rows with ``--context`` tokens each decode, by the device's own clock, held against the bytes that a
step must read at copy bandwidth: all weights that are always read, the experts that were hit (counted, in
steps beside the timed ones) and the KV. A prompt of ``--prompt`` tokens is held against the products' peak.
What a section could not do is printed, and the next one runs. No time here holds a message between ranks.

    python -m benchmarks.gpu_rank --model kimi-k2.5 --tp 8 [--ep 8] [--memory GIB] [--kernels DIRECTORY]
"""

import argparse
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from benchmarks.figures import Demand, Figure, as_data, missed, table
from benchmarks.gpu_step import Replays, kernels
from benchmarks.lone_rank import LoneRank, Steps
from benchmarks.rank_work import RankWork
from models.known import known_model, known_names
from models.machines import GIB, GPUS, gpu_of_driver
from models.memory import CUDA_OVERHEADS, StepLimits, plan_memory
from models.registry import build_spec
from models.spec import ModelSpec
from orchestrator.boot_report import rank_memory, why_so_many_tokens
from orchestrator.budget import GPU_MARGIN_BYTES
from orchestrator.config import GPU_DEFAULTS
from orchestrator.waterfall import memory_table
from protocol.topology import Topology

T = TypeVar("T")

COPY_PART = 4050 / 4660
"""Of what a GPU reads at most, what a copy moves (one H200)."""
AIM_PART = 0.7
"""Of copy bandwidth."""
WARM, TIMED, COUNTED, PROFILED = 4, 36, 4, 4
"""Steps of one token a row; ``Replays`` leaves the first four of the timed ones out."""
PROMPTS = 3
MOST_OFF = 1.0
"""Per cent, of KV and of the GPU's memory."""


class Report:
    """Owner of what was found, and of what failed."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.facts: dict[str, Any] = {}
        self.failures: list[str] = []

    def add(self, name: str, value: float, unit: str, demand: Demand, *, higher: bool = False) -> None:
        """Add a figure."""
        self.figures.append(
            Figure(name=name, value=value, unit=unit, higher_is_better=higher, demand=demand)
        )

    def attempt(self, name: str, work: Callable[[], T]) -> T | None:
        """Return what a section gives; print what goes wrong in it, and go on."""
        began_s, found = time.monotonic(), None
        try:
            found = work()
        except Exception as error:  # of any part; the others are still worth measuring
            traceback.print_exc(file=sys.stdout)
            self.failures.append(f"{name}: {type(error).__name__}: {error}")
        print(f"[{name}: {time.monotonic() - began_s:.1f} s]", flush=True)
        return found


class Measurement:
    """The sections behind the boot."""

    def __init__(
        self, report: Report, rank: LoneRank, num_blocks: int, options: argparse.Namespace
    ) -> None:
        self._report, self._rank, self._options = report, rank, options
        self._steps = Steps(rank, num_blocks)
        self._work = RankWork(rank.spec, rank.topology)
        properties = torch.cuda.get_device_properties(0)
        gpu = gpu_of_driver(rank.device.name, properties.total_memory) or GPUS["H200-141GB"]
        self._read_bytes_s, self._flops = gpu.read_bytes_s, gpu.matmul_flops
        report.facts |= {"held_against": gpu.name, "read_bytes_s": self._read_bytes_s}

    def decode(self, rows: int) -> None:
        """Time steps of one token a row."""
        steps, report = self._steps, self._report
        steps.recover()
        grown = WARM + TIMED + COUNTED + PROFILED + 1
        context = min(self._options.context, steps.room(rows) - grown)
        if context < 1:
            raise ValueError(f"the KV that there is holds no {rows} rows: ask for fewer, or more --memory")
        if context < self._options.context:
            print(f"{rows} rows: the KV that there is holds {context} tokens of each")
        steps.begin(rows, context, context + grown)
        steps.decode(WARM)
        began_s = time.perf_counter()
        with Replays(steps.instance) as replays:
            answer = steps.decode(TIMED)
        host_ms = (time.perf_counter() - began_s) / TIMED * 1e3
        device = replays.figures()
        hit = self._hit()
        weights = self._work.weight_bytes(hit)
        kv = self._work.kv_bytes(rows, context + WARM + TIMED / 2)
        at_copy_ms = (weights + kv) / (self._read_bytes_s * COPY_PART) * 1e3
        step_ms = device["device_step_ms"]
        demand = Demand(ceiling=at_copy_ms, aim=at_copy_ms / AIM_PART)
        report.add(f"decode step, {rows} rows of {context}", step_ms, "ms", demand)
        expected = sum(self._work.expected_hit(rows).values())
        found = {
            "context": context,
            **device,
            "host_step_ms": host_ms,
            "weight_bytes": weights,
            "kv_bytes": kv,
            "experts_hit": sum(hit.values()),
            "experts_expected": expected,
            "distinct_tokens": len({token for row in answer.token_ids for token in row}) if answer else 0,
        }
        per_s = (weights + kv) / step_ms * 1e3
        print(
            f"{rows} rows: device {step_ms:.3f} ms a step (replay {device['replay_ms']:.3f}, gap "
            f"{device['gap_ms'] * 1e3:.1f} us), host {host_ms:.3f}; reads {weights / 1e9:.2f} GB of "
            f"weights and {kv / 1e9:.2f} of KV at {per_s / 1e9:,.0f} GB/s: {at_copy_ms / step_ms:.1%} of "
            f"copying, {per_s / self._read_bytes_s:.1%} of reading; experts hit {sum(hit.values()):.0f}, "
            f"{expected:.0f} expected; {found['distinct_tokens']} distinct tokens"
        )
        if self._options.profile:
            found["kernels"] = kernels(lambda: steps.decode(PROFILED), PROFILED)
            _print_kernels(found["kernels"], self._options.profile)
        report.facts[f"decode_{rows}"] = found
        steps.end()

    def prefill(self, prompt: int) -> None:
        """Time a prompt's way to its first token."""
        steps, report = self._steps, self._report
        steps.recover()
        if prompt > steps.room(1):
            raise ValueError(f"the KV that there is holds {steps.room(1)} tokens, not {prompt}")
        took_s, chosen = list[float](), dict[int, float]()
        for _ in range(1 + PROMPTS):
            before = steps.chosen()
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            steps.begin(1, prompt, prompt)
            took_s.append(time.perf_counter() - began_s)
            chosen = {layer: float(sum(more)) for layer, more in _since(before, steps.chosen()).items()}
            steps.end()
        prompt_s = statistics.median(took_s[1:])
        flops = self._work.prompt_flops(prompt, chosen)
        rate = flops / prompt_s / 1e12
        demand = Demand(ceiling=self._flops / 1e12)
        report.add(f"prefill of {prompt} tokens", rate, "TFLOP/s", demand, higher=True)
        report.facts["prefill"] = {"seconds": took_s, "flops": flops, "choices": sum(chosen.values())}
        print(
            f"{prompt} tokens: {prompt_s * 1e3:.1f} ms ({', '.join(f'{s * 1e3:.1f}' for s in took_s)}), "
            f"{prompt / prompt_s:,.0f} tokens/s, {flops / 1e12:.1f} TFLOP, {rate:.0f} TFLOP/s"
        )
        if self._options.profile:

            def work() -> None:
                steps.begin(1, prompt, prompt)
                steps.end()

            report.facts["prefill"]["kernels"] = found = kernels(work, 1)
            _print_kernels(found, self._options.profile)

    def _hit(self) -> dict[int, float]:
        """Return how many experts a step of the running rows hits, by layer, on average."""
        total: dict[int, float] = {}
        before = self._steps.chosen()
        for _ in range(COUNTED):
            self._steps.decode(1)
            after = self._steps.chosen()
            for layer, more in _since(before, after).items():
                total[layer] = total.get(layer, 0.0) + sum(count > 0 for count in more) / COUNTED
            before = after
        return total


def _since(before: Mapping[int, list[int]], after: Mapping[int, list[int]]) -> dict[int, list[int]]:
    return {
        layer: [n - m for n, m in zip(counts, before[layer], strict=True)]
        for layer, counts in after.items()
    }


def _print_kernels(found: list[dict[str, Any]], top: int) -> None:
    print(f"  {sum(float(one['us']) for one in found):9.1f} us in all kernels")
    for one in found[:top]:
        print(f"  {one['us']:9.1f} us {one['launches']:6.1f} x  {one['kernel']}")


def _hold_memory(report: Report, lone: LoneRank, num_blocks: int) -> None:
    """Print the memory table, and hold KV and everything else against the plan."""
    plan, measured = lone.plan, lone.assembled.lines()
    rank = plan.ranks[0]
    Console(width=110).print(memory_table(rank_memory(rank, measured)))
    predicted = {line.name: line.predicted_bytes for line in rank.lines}
    report.facts["memory"] = [[name, size, measured.get(name)] for name, size in predicted.items()]
    report.facts["kv_blocks"] = {"planned": plan.num_blocks, "granted": num_blocks}
    kv_off = 100 * (num_blocks / plan.num_blocks - 1)
    other = sum(measured.get(name, 0) - size for name, size in predicted.items() if name != "kv cache")
    off = 100 * other / rank.budget_bytes
    print(
        f"KV: {num_blocks} blocks, {plan.num_blocks} were planned ({kv_off:+.2f} %); everything else took "
        f"{other / 2**20:+,.0f} MiB more than planned, {off:+.2f} % of the GPU's memory"
    )
    report.add("KV off the plan", abs(kv_off), "%", Demand(must=MOST_OFF))
    report.add("memory off the plan", abs(off), "%", Demand(must=MOST_OFF))


def measure(
    report: Report, spec: ModelSpec, topology: Topology, limits: StepLimits, options: argparse.Namespace
) -> None:
    """Boot, and run the sections."""
    budget = round(options.memory * GIB)
    plan = plan_memory(spec, topology, [budget] * topology.tp, limits, CUDA_OVERHEADS, None)
    print(f"{why_so_many_tokens(plan)}. {plan.note or ''}")
    cache = options.kernels or Path(tempfile.mkdtemp(prefix="tandem-kernels-"))
    rank = report.attempt("build", lambda: LoneRank(spec, topology, plan, limits, cache))
    if rank is None:
        return
    print(
        f"{rank.device.name}, torch {torch.__version__}; operators of FlashInfer: {rank.device.operators}"
    )
    report.attempt("warm-up", rank.warm_up)
    num_blocks = report.attempt("map KV", rank.map_rest)
    if num_blocks is None:
        return  # Steps would write to what is not mapped.
    report.attempt("memory", partial(_hold_memory, report, rank, num_blocks))
    report.facts["spans"] = {span.name: span.end_s - span.start_s for span in rank.spans.found}
    print(", ".join(f"{name} {took_s:.2f} s" for name, took_s in report.facts["spans"].items()))
    measurement = Measurement(report, rank, num_blocks, options)
    for rows in options.rows:
        report.attempt(f"decode, {rows} rows", partial(measurement.decode, rows))
    report.attempt("prefill", lambda: measurement.prefill(options.prompt))
    report.attempt("end", rank.assembled.runner.close)


def main() -> None:
    """Print the table; exit 1 where something failed or a demand is missed."""
    default_gib = (GPUS["H100-80GB"].usable_bytes - GPU_MARGIN_BYTES) / GIB
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, choices=known_names())
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--memory", type=float, default=default_gib, help="GiB that the rank may take")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=1024, help="tokens of each row that decodes")
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--max-rows", type=int, default=GPU_DEFAULTS["max_rows"])
    parser.add_argument("--kernels", type=Path, help="the kernel cache; without it all are compiled")
    parser.add_argument("--profile", type=int, default=0, help="kernels to name")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known, topology = known_model(options.model), Topology(options.tp, ep=options.ep)
    spec = build_spec(known.config, known.source, GPU_DEFAULTS["dtype"], options.kv_dtype)
    limits = StepLimits(
        options.max_rows, GPU_DEFAULTS["step_tokens"], options.max_rows, GPU_DEFAULTS["block_tokens"]
    )
    report = Report()
    report.facts |= {"model": options.model, "layout": str(topology), "memory_gib": options.memory}
    report.attempt(f"{options.model}, {topology}", lambda: measure(report, spec, topology, limits, options))
    print(table(report.figures))
    bad = missed(report.figures) + report.failures
    for line in bad:
        print(f"not met: {line}")
    if options.json:
        options.json.write_bytes(as_data(report.figures, {**report.facts, "failures": report.failures}))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
