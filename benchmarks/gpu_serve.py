"""How fast is the whole system on a GPU, from ``tandem serve`` to the tokens that a client reads?

A server is started as a user would, and read through the SDK: the time of a decode step at several numbers
of requests (128 tokens in, 128 out, greedy), prefill, decode beside arriving prompts, processor time, and
what is left for the KV cache. Every figure stands beside its ceiling, demand and other engines' figures
where they are known: for Llama-3-8B in bfloat16 on one H200.

    python -m benchmarks.make_checkpoint llama-3-8b /dev/shm/llama-3-8b --tokenizer
    python -m benchmarks.gpu_serve --model /dev/shm/llama-3-8b --json figures.json [-- --memory 139 …]

What follows ``--`` is passed on to ``tandem serve``. Decode beside prefill has a server of its own, whose
steps are as large as ``--mixed-chunk`` and the decoding rows together. Exit code 1: a demand is missed.
"""

import argparse
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Demand, Figure, as_data, missed, table
from benchmarks.known_models import name_of
from benchmarks.llama_8b_on_h200 import DEMANDS, DEVICE_GIB, decode_ceiling_ms, weight_bytes
from benchmarks.process_cpu import serving
from benchmarks.served import Served
from benchmarks.token_times import steady_window, step_figures
from models.registry import load_spec, read_config
from models.spec import ModelSpec

PARTS = ("idle", "decode", "prefill", "mixed")
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the server."""

    rows: tuple[int, ...] = (1, 8, 64, 256)
    prompt_tokens: int = 128
    answer_tokens: int = 128
    repeats: int = 3
    prefill_prompts: int = 4
    prefill_tokens: int = 7000
    mixed_rows: int = 32
    mixed_prompts: int = 24
    mixed_prompt_tokens: int = 2000
    mixed_lead_s: float = 1.0
    """Before the first prompt, while there is decode alone."""
    mixed_interval_s: float = 0.1
    mixed_chunk: int = 192
    idle_s: float = 5.0
    limit_s: float = 120.0
    """What is sent at a time may take so long."""


def decode(served: Served, load: Load, rows: int) -> dict[str, float]:
    """Return one repeat of steady decode."""
    requests = [served.request(load.prompt_tokens, load.answer_tokens) for _ in range(rows)]
    streams, cpu = served.send(requests)
    window = steady_window(streams)
    found = step_figures(streams, window)
    used = cpu.between(*window)
    found |= {f"{role}_percent": seconds / (window[1] - window[0]) * 100 for role, seconds in used.items()}
    found["cpu_percent"] = serving(used) / (window[1] - window[0]) * 100
    found["cpu_us_per_token"] = found["cpu_percent"] / 100 / found["tokens_per_s"] * 1e6
    whole = min(s.sent_s for s in streams), max(s.last_s for s in streams)
    found["run_cpu_s"] = serving(cpu.between(*whole))
    return found


def prefill(served: Served, load: Load) -> dict[str, float]:
    """Return one repeat of prefill: long prompts at once, one token each."""
    requests = [served.request(load.prefill_tokens, 1) for _ in range(load.prefill_prompts)]
    streams, _ = served.send(requests)
    seconds = max(s.last_s for s in streams) - min(s.sent_s for s in streams)
    return {"tokens_per_s": load.prefill_prompts * load.prefill_tokens / seconds, "seconds": seconds}


def mixed(served: Served, load: Load) -> dict[str, Any]:
    """Return a decode step alone, then beside prompts that arrive at an interval."""
    rows = load.mixed_rows
    room = served.info.context - load.prompt_tokens
    requests = [served.request(load.prompt_tokens, room, is_background=True) for _ in range(rows)]
    for number in range(load.mixed_prompts):
        delay_s = load.mixed_lead_s + number * load.mixed_interval_s
        requests.append(served.request(load.mixed_prompt_tokens, 1, delay_s))
    streams, _ = served.send(requests)
    decoding, arriving = streams[:rows], streams[rows:]
    start, end = steady_window(decoding)
    first = min(s.sent_s for s in arriving)
    last = max(s.last_s for s in arriving)
    if not start < first < last <= end:
        raise SystemExit(
            "the prompts did not all come while the others decoded: raise --mixed-lead-s, or lower "
            "--mixed-prompts or --mixed-interval-s "
            f"(decode {start - end:.2f} to 0 s, prompts {first - end:.2f} to {last - end:.2f} s)"
        )
    return {
        "pure": step_figures(decoding, (start, first)),
        "beside": step_figures(decoding, (first, last)),
        "prompt_s": statistics.median(s.last_s - s.sent_s for s in arriving),
    }


class Report:
    """Collects figures, and what they are held against if model and machine are those of the demands."""

    def __init__(self, figures: list[Figure], model: ModelSpec, *, is_reference: bool) -> None:
        """``figures``: where they are added, so that those before a failure are not lost."""
        self._figures, self._model, self._is_reference = figures, model, is_reference

    def add(
        self,
        name: str,
        samples: Sequence[float],
        unit: str,
        *,
        higher_is_better: bool = False,
        ceiling: float | None = None,
    ) -> None:
        """Add the median of samples, and say it on standard error."""
        demand = Demand()
        if self._is_reference:
            known = DEMANDS.get(name, demand)
            demand = Demand(
                ceiling=known.ceiling if ceiling is None else ceiling,
                must=known.must,
                aim=known.aim,
                vllm=known.vllm,
                sglang=known.sglang,
            )
        figure = Figure(
            name=name,
            value=statistics.median(samples),
            unit=unit,
            higher_is_better=higher_is_better,
            samples=list(samples),
            demand=demand,
        )
        self._figures.append(figure)
        print(f"{name}: {figure.value:.4g} {unit}", file=sys.stderr, flush=True)

    def add_server(self, served: Served) -> None:
        """Add what the server says of itself."""
        self.add("boot", [served.boot_s], "s")
        # The plan's line of the tightest rank: this is one rank's where there are several.
        line = next(line for line in served.info.memory if line.name == "kv cache")
        size = line.measured_bytes if line.measured_bytes is not None else line.predicted_bytes
        left = DEVICE_GIB - weight_bytes(self._model) / GIB
        self.add("KV cache", [size / GIB], "GiB", higher_is_better=True, ceiling=left)
        self.add("KV tokens", [served.info.kv_tokens], "tokens", higher_is_better=True)

    def add_decode(self, load: Load, rows: int, found: Sequence[dict[str, float]]) -> None:
        """Add the repeats of steady decode at a number of requests."""
        name = "1 request" if rows == 1 else f"{rows} requests"

        def of(key: str) -> list[float]:
            return [one[key] for one in found]

        context = load.prompt_tokens + load.answer_tokens / 2
        least = decode_ceiling_ms(self._model, rows, context)
        self.add(f"decode step, {name}", of("step_ms"), "ms", ceiling=least)
        self.add(f"decode step mean, {name}", of("step_mean_ms"), "ms", ceiling=least)
        self.add(f"decode gap p99, {name}", of("gap_p99_ms"), "ms")
        most = rows / least * 1e3
        self.add(
            f"decode rate, {name}", of("tokens_per_s"), "tokens/s", higher_is_better=True, ceiling=most
        )
        self.add(f"CPU in decode, {name}", of("cpu_percent"), "% of a core")
        self.add(f"CPU a token, {name}", of("cpu_us_per_token"), "µs")
        self.add(f"CPU of the run, {name}", of("run_cpu_s"), "s")

    def add_mixed(self, found: Sequence[dict[str, Any]]) -> None:
        """Add the repeats of decode beside prefill."""
        pure = [one["pure"]["step_ms"] for one in found]
        p99 = [one["beside"]["gap_p99_ms"] for one in found]
        self.add("mixed, pure step", pure, "ms")
        self.add("mixed, step median", [one["beside"]["step_ms"] for one in found], "ms")
        self.add("mixed, gap p99", p99, "ms")
        self.add("mixed p99 / pure step", [a / b for a, b in zip(p99, pure, strict=True)], "×")
        self.add("mixed, time to a prompt's token", [one["prompt_s"] for one in found], "s")


class Measurement:
    """What has been measured so far, by parts. Its figures and samples stay whatever happens then."""

    def __init__(
        self, model: Path, devices: str, load: Load, arguments: Sequence[str] = (), gpu: str | None = None
    ) -> None:
        """``arguments``: for ``tandem serve``. ``gpu``: what the driver calls it."""
        self.figures: list[Figure] = []
        self.raw: dict[str, Any] = {}
        """Every sample."""
        self._model, self._devices, self._load = model, devices, load
        self._arguments, self._gpu = tuple(arguments), gpu
        self._draw = random.Random(load.repeats)

    def run(self, parts: Sequence[str]) -> None:
        """Measure these parts, on one server or two."""
        if set(parts) - {"mixed"}:
            with self._serve() as served:
                report = self._report(served)
                report.add_server(served)
                self.raw["memory"] = [
                    [line.name, line.predicted_bytes, line.measured_bytes] for line in served.info.memory
                ]
                if "idle" in parts:
                    self.raw["idle"] = served.idle_percent(self._load.idle_s)
                    report.add("CPU idle", [serving(self.raw["idle"])], "% of a core")
                if "decode" in parts:
                    self._decode(served, report)
                if "prefill" in parts:
                    self._prefill(served, report)
        if "mixed" in parts:
            self._mixed()

    def _serve(self, *more: str) -> Served:
        arguments = (*self._arguments, *more)
        return Served(self._model, self._devices, arguments, self._draw, self._load.limit_s)

    def _decode(self, served: Served, report: Report) -> None:
        samples = self.raw.setdefault("decode", {})
        for rows in self._load.rows:
            decode(served, self._load, rows)  # What is done once, at this size, is done.
            samples[rows] = [decode(served, self._load, rows) for _ in range(self._load.repeats)]
            report.add_decode(self._load, rows, samples[rows])

    def _prefill(self, served: Served, report: Report) -> None:
        load = self._load
        prefill(served, load)
        found = self.raw["prefill"] = [prefill(served, load) for _ in range(load.repeats)]
        name = f"prefill, {load.prefill_prompts} x {load.prefill_tokens}"
        report.add(name, [one["tokens_per_s"] for one in found], "tokens/s", higher_is_better=True)

    def _mixed(self) -> None:
        load = self._load
        step = load.mixed_rows + load.mixed_chunk
        rows = min(step, load.mixed_rows + load.mixed_prompts)
        with self._serve("--max-rows", str(rows), "--step-tokens", str(step)) as served:
            self.raw["mixed_chunk"] = load.mixed_chunk
            self.raw["mixed"] = [mixed(served, load) for _ in range(load.repeats)]
            self._report(served).add_mixed(self.raw["mixed"])

    def _report(self, served: Served) -> Report:
        info = served.info
        is_one_rank = (info.tp, info.pp) == (1, 1)
        is_model = name_of(read_config(self._model)) == "llama-3-8b" and info.dtype == "bfloat16"
        is_machine = self._gpu is not None and "H200" in self._gpu
        spec = load_spec(self._model, info.dtype)
        return Report(self.figures, spec, is_reference=is_one_rank and is_model and is_machine)


def gpu_name() -> str | None:
    """Return what the driver calls the first GPU; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def main() -> None:
    """Print the table, write JSON; exit 1 where a demand is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--devices", default="cuda:0")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    fields = Load()
    parser.add_argument("--rows", type=int, nargs="+", default=fields.rows)
    for name in Load.__dataclass_fields__:
        if name != "rows":
            default = getattr(fields, name)
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(option, type=type(default), default=default, help=f"[{default}]")
    own = sys.argv[1:]
    passed: list[str] = []
    if "--" in own:
        own, passed = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    load = Load(**{name: getattr(options, name) for name in Load.__dataclass_fields__})
    gpu = None if options.devices == "cpu" else gpu_name()
    measurement = Measurement(options.model, options.devices, load, passed, gpu)
    try:
        measurement.run(options.parts)
    finally:
        print(table(measurement.figures))
        if options.json:
            facts = {"gpu": gpu, "model": str(options.model), "serve": passed, "raw": measurement.raw}
            options.json.write_bytes(as_data(measurement.figures, facts))
    failures = missed(measurement.figures)
    if failures:
        sys.exit("missed: " + "; ".join(failures))


if __name__ == "__main__":
    main()
