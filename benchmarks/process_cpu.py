"""Processor time of a running server's processes, seen from outside."""

import bisect
import os
import time
from pathlib import Path

from tandem.instances import children_of

CLOCK_TICKS_S = os.sysconf("SC_CLK_TCK")
ROLES = ("orchestrator", "workers", "helpers")


def cpu_s(pid: int) -> float:
    """Return a process's user and system time, all its threads', to the nanosecond where the kernel can.

    Source: clock_getcpuclockid(3), the kernel's number for it: ``~pid << 3 | CPUCLOCK_SCHED``; else
    proc(5), fields 14 and 15 of stat, in ticks.
    """
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_S


class ServerCpu:
    """The processes of one server by role, and a record of their processor time."""

    def __init__(self, pid: int) -> None:
        self.pids: dict[str, list[int]] = {"orchestrator": [pid], "workers": [], "helpers": []}
        for child in children_of(pid):
            # Ranks say what they are in their title: "tandem: NAME worker 1/2".
            role = "workers" if b" worker " in Path(f"/proc/{child}/cmdline").read_bytes() else "helpers"
            self.pids[role].append(child)
        self._times: list[float] = []
        self._used: list[tuple[float, ...]] = []

    def sample(self) -> None:
        """Record now."""
        used = tuple(sum(cpu_s(pid) for pid in self.pids[role]) for role in ROLES)
        self._times.append(time.monotonic())
        self._used.append(used)

    def between(self, start_s: float, end_s: float) -> dict[str, float]:
        """Return the seconds that each role used between two moments, from the samples around them."""
        return {
            role: self._at(end_s, number) - self._at(start_s, number) for number, role in enumerate(ROLES)
        }

    def _at(self, moment_s: float, role: int) -> float:
        after = bisect.bisect_left(self._times, moment_s)
        if after in (0, len(self._times)):
            return self._used[min(after, len(self._used) - 1)][role]
        before_s, after_s = self._times[after - 1], self._times[after]
        first, second = self._used[after - 1][role], self._used[after][role]
        return first + (second - first) * (moment_s - before_s) / (after_s - before_s)


def serving(used: dict[str, float]) -> float:
    """Return the seconds of the orchestrator and the ranks together."""
    return used["orchestrator"] + used["workers"]
