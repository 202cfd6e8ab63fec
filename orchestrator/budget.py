"""What a device's memory budget is, and how its ranks share it and the machine's cores.

Control groups: https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from models.memory import CPU_OVERHEADS, CUDA_OVERHEADS, DeviceOverheads
from orchestrator.gpus import free_bytes, ordinal_of
from protocol.errors import InvalidRequestError, MemoryBudgetError, StorageError

GIB = 1 << 30
DEFAULT_CAP_BYTES = 4 * GIB
GPU_MARGIN_BYTES = 192 << 20
"""What a GPU's default leaves alone for each rank: the driver's own needs grow a little with time."""
DeviceKind = Literal["cpu", "cuda"]
DEFAULT_SHARE = 4
"""A CPU's default is the lesser of the cap and this part of what is left."""


def rank_budgets(
    devices: tuple[str, ...], world_size: int, memory_bytes: int | None, environment: Mapping[str, str]
) -> list[int]:
    """Return each rank's budget in bytes; ranks of one device get equal parts of its budget.

    ``environment``: the user's, which may hide GPUs.

    Errors: ``UnsupportedModelError`` where GPUs cannot be used here; ``InvalidRequestError`` for a device
    that is none, or where ``memory_bytes`` leaves a rank nothing; ``MemoryBudgetError`` for more than a
    GPU has left; ``StorageError`` where the machine does not say what it has.
    """
    placed = place_ranks(devices, world_size)
    if device_kind(devices) == "cpu":
        budgets = {"cpu": memory_bytes if memory_bytes is not None else default_cpu_bytes()}
    else:
        budgets = {
            device: _gpu_budget(device, placed.count(device), memory_bytes, environment)
            for device in sorted(set(placed))
        }
    shares = [budgets[device] // placed.count(device) for device in placed]
    if min(shares) < 1:
        raise InvalidRequestError(
            f"a device memory of {min(budgets.values())} bytes leaves its ranks nothing: give --memory in "
            "GiB",
            field="memory",
        )
    return shares


def device_kind(devices: tuple[str, ...]) -> DeviceKind:
    """Return what all ranks run on. Errors: ``InvalidRequestError`` for a mixture, or what is no device."""
    kinds = {"cpu" if device == "cpu" else "cuda" for device in devices}
    for device in devices:
        if device != "cpu":
            ordinal_of(device)
    if kinds == {"cpu", "cuda"}:
        raise InvalidRequestError(
            f"{', '.join(devices)}: ranks of one instance run on GPUs or on the CPU, not on both",
            field="devices",
        )
    return "cuda" if kinds == {"cuda"} else "cpu"


def overheads(devices: tuple[str, ...]) -> DeviceOverheads:
    """Return what such devices take beside the model."""
    return CPU_OVERHEADS if device_kind(devices) == "cpu" else CUDA_OVERHEADS


def _gpu_budget(device: str, ranks: int, asked: int | None, environment: Mapping[str, str]) -> int:
    left = free_bytes(device, environment)
    if asked is None:
        return left - ranks * GPU_MARGIN_BYTES
    if asked > left:
        raise MemoryBudgetError(
            f"{asked / GIB:.2f} GiB were asked, {device} has {left / GIB:.2f} left: give a smaller "
            "--memory, or end what takes it",
            field="memory",
        )
    return asked


def check_left(memory_bytes: int | None) -> None:
    """Refuse a budget that the machine does not have: the kernel would end a rank later, without a word.

    Errors: ``MemoryBudgetError``.
    """
    if memory_bytes is None:
        return
    left = bytes_left()
    if memory_bytes > left:
        raise MemoryBudgetError(
            f"{memory_bytes / GIB:.2f} GiB were asked, the machine has {left / GIB:.2f} left: "
            "give a smaller --memory, or end what takes it",
            field="memory",
        )


def place_ranks(devices: tuple[str, ...], world_size: int) -> list[str]:
    """Return the device of each rank: contiguous runs, as equal as may be.

    Errors: ``InvalidRequestError`` for no device, or more of them than ranks.
    """
    if not 1 <= len(devices) <= world_size:
        raise InvalidRequestError(
            f"{len(devices)} devices were given for {world_size} ranks: give 1 to {world_size}",
            field="devices",
        )
    return [devices[rank * len(devices) // world_size] for rank in range(world_size)]


def threads_per_rank(num_cores: int, world_size: int) -> int:
    """Return a CPU rank's compute threads: the cores shared equally, at least one."""
    return max(num_cores // world_size, 1)


def default_cpu_bytes(root: Path = Path("/")) -> int:
    """Return what the CPU may use where nobody said: min(4 GiB, a quarter of what is left)."""
    return min(DEFAULT_CAP_BYTES, bytes_left(root) // DEFAULT_SHARE)


def bytes_left(root: Path = Path("/")) -> int:
    """Return what this process's control groups and the machine have left, in bytes, whichever is less.

    Page cache that can be given up counts as left. ``root`` is where ``proc`` and ``sys`` are found.
    Errors: ``StorageError`` where /proc/meminfo does not say.
    """
    return min([_machine_left(root), *_groups_left(root)])


def _machine_left(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError as error:
        raise StorageError(f"/proc/meminfo cannot be read ({error.strerror}): give --memory") from None
    raise StorageError("/proc/meminfo does not say what is available: give --memory")


def _groups_left(root: Path) -> list[int]:
    """Return what each memory control group over this process has left, of those with a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[int] = []
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = Path(path.lstrip("/"))
        # In a container the path may be the host's, and what is mounted the container's own group.
        for group in (inner, *inner.parents):
            left = _group_left(mount / group, names)
            if left is not None:
                found.append(left)
    return found


def _group_left(group: Path, names: tuple[str, str, str]) -> int | None:
    limit_name, usage_name, cache_name = names
    try:
        limit = (group / limit_name).read_text().strip()
        if limit == "max":
            return None
        usage = int((group / usage_name).read_text())
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None  # Not a group of this kind, or the root, which has no limit.
    return max(int(limit) - usage + int(stat.get(cache_name, 0)), 0)
