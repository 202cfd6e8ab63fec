"""What a boot did, when, and what it learnt: the waterfall, the memory table and the one-line answer.

The same as JSON (``--boot-report``). Times are on the machine's monotonic clock, so that every rank's bars
lie on one axis.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from models.memory import MemoryPlan, RankPlan
from protocol.client import MemoryRow
from protocol.control import Ready, Span
from protocol.errors import StorageError
from protocol.topology import Topology

ORCHESTRATOR = -1
"""The rank of its spans."""


class RankMemory(msgspec.Struct, frozen=True):
    """One rank's plan, each line beside what was measured."""

    rank: int
    layers: list[int]
    """[first, end)."""
    budget_bytes: int
    lines: list[MemoryRow]


class BootReport(msgspec.Struct, frozen=True):
    """One boot."""

    instance: str
    model: str
    tp: int
    pp: int
    ep: int
    dcp: int
    dtype: str
    seconds: float
    """From the start of the process to where requests are taken."""
    load_bytes: int
    """Read from the checkpoint, over all ranks."""
    load_seconds: float
    """From the first rank's first byte to the last one's last."""
    kv_tokens: int
    context: int
    why: str
    """Why the KV cache holds that many tokens, in one line."""
    note: str | None
    start_s: float
    """What the spans' times are counted from, monotonic."""
    spans: list[Span]
    memory: list[RankMemory]

    @property
    def load_gb_per_s(self) -> float:
        """Rate of the load."""
        return self.load_bytes / 1e9 / self.load_seconds if self.load_seconds > 0 else 0.0


class Spans:
    """Owner of the orchestrator's part of the waterfall."""

    def __init__(self, start_s: float | None = None) -> None:
        now_s = time.monotonic()
        self.start_s = now_s if start_s is None else start_s
        self.found: list[Span] = []
        if start_s is not None:
            self.found.append(Span(ORCHESTRATOR, "start", start_s, now_s))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a block."""
        began_s = time.monotonic()
        yield
        self.add(name, began_s)

    def add(self, name: str, began_s: float) -> None:
        """Add what began then and ends now."""
        self.found.append(Span(ORCHESTRATOR, name, began_s, time.monotonic()))


def process_start_s() -> float:
    """Return when this process was started, on the monotonic clock (proc(5): field 22 of stat)."""
    # The name, in parentheses, may hold anything.
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)


def make_report(
    instance: str,
    model: str,
    dtype: str,
    topology: Topology,
    plan: MemoryPlan,
    ready: Sequence[Ready],
    spans: Spans,
) -> BootReport:
    """Return the report of a boot that ends now."""
    found = sorted(
        [*spans.found, *(span for r in ready for span in r.spans)],
        key=lambda span: (span.rank, span.start_s),
    )
    loads = [span for span in found if span.bytes]
    memory = [
        rank_memory(ranks, {m.name: m.measured_bytes for m in r.memory})
        for ranks, r in zip(plan.ranks, ready, strict=True)
    ]
    return BootReport(
        instance=instance,
        model=model,
        tp=topology.tp,
        pp=topology.pp,
        ep=topology.ep,
        dcp=topology.dcp,
        dtype=dtype,
        seconds=time.monotonic() - spans.start_s,
        load_bytes=sum(span.bytes for span in loads),
        load_seconds=max((s.end_s for s in loads), default=0.0)
        - min((s.start_s for s in loads), default=0.0),
        kv_tokens=plan.kv_tokens,
        context=plan.context,
        why=why_so_many_tokens(plan),
        note=plan.note,
        start_s=spans.start_s,
        spans=found,
        memory=memory,
    )


def rank_memory(plan: RankPlan, measured: dict[str, int]) -> RankMemory:
    """Return a rank's plan beside what was measured."""
    rows = [
        MemoryRow(line.name, line.predicted_bytes, measured.get(line.name), line.because)
        for line in plan.lines
    ]
    return RankMemory(plan.rank, [plan.layers.start, plan.layers.stop], plan.budget_bytes, rows)


def why_so_many_tokens(plan: MemoryPlan) -> str:
    """Return the answer to "why is my KV cache N tokens?" in one line."""
    tightest = plan.tightest
    spent = [line for line in tightest.lines if line.name != "kv cache"]
    weights = next(line.predicted_bytes for line in spent if line.name == "weights")
    rest = sum(line.predicted_bytes for line in spent) - weights
    per_token = tightest.block_bytes * plan.num_blocks / max(plan.kv_tokens, 1)
    by_global = (
        f" (in requests of {plan.context:,}; {plan.global_kv_tokens:,} by the global layers alone)"
        if plan.global_kv_tokens > plan.kv_tokens
        else ""
    )
    return (
        f"KV cache: {plan.kv_tokens:,} tokens{by_global} because rank {tightest.rank} has "
        f"{size(tightest.budget_bytes)}, weights take {size(weights)} of it and everything else "
        f"{size(rest)}; the {size(tightest.kv_bytes)} left hold {plan.num_blocks:,} blocks, "
        f"{size(per_token)} a token"
    )


def size(num_bytes: float) -> str:
    """Return bytes in the largest binary unit of which there is at least one."""
    for unit, bound in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(num_bytes) >= bound:
            return f"{num_bytes / bound:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def check_report_path(path: Path) -> None:
    """Refuse a place where no report can be written, before a boot has taken its time.

    Errors: ``StorageError``.
    """
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(
            f"the boot report {path} cannot be written: {path.parent} is no directory to write to",
            field="boot_report",
        )


def write_report(report: BootReport, path: Path) -> None:
    """Write the report as JSON, replacing the file at once; ``StorageError`` where that cannot be."""
    content = msgspec.json.format(msgspec.json.encode(report), indent=2)
    scratch = path.with_name(f"{path.name}.new")
    try:
        scratch.write_bytes(content + b"\n")
        scratch.replace(path)
    except OSError as error:
        raise StorageError(f"the boot report {path} cannot be written: {error.strerror}") from None
