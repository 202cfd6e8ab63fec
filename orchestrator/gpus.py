"""What the NVIDIA driver says of this machine's GPUs, through NVML: no CUDA context is made."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from protocol.errors import InvalidRequestError, UnsupportedModelError

NEEDS = "GPUs need the driver and `make setup EXTRAS=test,cuda`; --devices cpu needs neither"


def free_bytes(device: str, environment: Mapping[str, str]) -> int:
    """Return what a device, ``cuda:N``, has left. N counts as CUDA does in this user's environment.

    Errors: ``UnsupportedModelError`` without a driver; ``InvalidRequestError`` for no such device.
    """
    with _nvml() as nvml:
        return int(nvml.nvmlDeviceGetMemoryInfo(_handle(nvml, device, environment)).free)


def device_name(device: str, environment: Mapping[str, str]) -> tuple[str, int]:
    """Return what the driver calls a device, and its bytes in all. Errors: as ``free_bytes``."""
    with _nvml() as nvml:
        handle = _handle(nvml, device, environment)
        return str(nvml.nvmlDeviceGetName(handle)), int(nvml.nvmlDeviceGetMemoryInfo(handle).total)


def architectures(environment: Mapping[str, str]) -> list[tuple[int, int]]:
    """Return the compute capabilities of this user's GPUs, each once. Errors: as ``free_bytes``."""
    with _nvml() as nvml:
        visible = _visible(environment.get("CUDA_VISIBLE_DEVICES"), nvml.nvmlDeviceGetCount())
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in visible]
        found = {tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)) for handle in handles}
    if not found:
        raise UnsupportedModelError(f"no GPU is to be seen: {NEEDS}", field="devices")
    return sorted((int(major), int(minor)) for major, minor in found)


def ordinal_of(device: str) -> int:
    """Return N of ``cuda:N``. Errors: ``InvalidRequestError``."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isascii() or not number.isdigit():
        raise InvalidRequestError(
            f"{device!r} is no device: give cpu, or cuda:0 and so on", field="devices"
        )
    return int(number)


def _handle(nvml: Any, device: str, environment: Mapping[str, str]) -> Any:
    visible = _visible(environment.get("CUDA_VISIBLE_DEVICES"), nvml.nvmlDeviceGetCount())
    ordinal = ordinal_of(device)
    if ordinal >= len(visible):
        raise InvalidRequestError(
            f"device {device} was asked, this machine has {len(visible)} GPUs (cuda:0 is the first)",
            field="devices",
        )
    return nvml.nvmlDeviceGetHandleByIndex(visible[ordinal])


def _visible(listed: str | None, count: int) -> list[int]:
    if listed is None:
        return list(range(count))
    numbers = [part.strip() for part in listed.split(",") if part.strip()]
    if not all(number.isdigit() and int(number) < count for number in numbers):
        raise InvalidRequestError(
            f"CUDA_VISIBLE_DEVICES={listed!r} names GPUs otherwise than by their number below {count}: "
            "unset it, and choose with --devices",
            field="devices",
        )
    return [int(number) for number in numbers]


@contextmanager
def _nvml() -> Iterator[Any]:
    try:
        import pynvml
    except ImportError:
        raise UnsupportedModelError(
            f"the CUDA packages are not installed: {NEEDS}", field="devices"
        ) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise UnsupportedModelError(
            f"no NVIDIA driver answers ({error}): {NEEDS}", field="devices"
        ) from None
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
