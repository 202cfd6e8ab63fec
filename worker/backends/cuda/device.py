"""One GPU as one rank uses it: its context, stream and kernels, and what it has taken so far."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from cuda.bindings import driver

from worker.backends.cuda.compiler import KernelCache
from worker.backends.cuda.driver import check
from worker.backends.cuda.launch import Kernels

FLASHINFER_VERSION = "0.6.14"


@dataclass(frozen=True, slots=True)
class Device:
    """Made once in a process, by ``open``."""

    ordinal: int
    torch_device: torch.device
    stream: torch.cuda.Stream
    """Current in the thread that opened the device: everything of a step is queued on it."""
    name: str
    """What the driver calls it."""
    kernel_cache: Path
    kernels: Kernels
    operators: Path | None
    """Where FlashInfer's compiled operators for this device are; None: they were never built."""
    budget_bytes: int
    is_alone: bool
    """Whether no other rank shares the device, so that what it lacks is what this rank took."""
    _free_before: int

    @classmethod
    def open(cls, ordinal: int, kernel_cache: Path, budget_bytes: int, *, is_alone: bool) -> Self:
        """Make the context current in this thread, with a stream of our own."""
        check(driver.cuInit(0), "cuInit")
        free_before = _free_without_context(ordinal)
        device = torch.device("cuda", ordinal)
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
        # Results must not depend on how many rows share a product, nor on a fast path's rounding.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(stream)
        kernels = Kernels(KernelCache(kernel_cache, architecture(ordinal)))
        found = operators_directory(kernel_cache, architecture(ordinal))
        operators = found if found.is_dir() else None
        return cls(
            ordinal=ordinal,
            torch_device=device,
            stream=stream,
            name=torch.cuda.get_device_name(device),
            kernel_cache=kernel_cache,
            kernels=kernels,
            operators=operators,
            budget_bytes=budget_bytes,
            is_alone=is_alone,
            _free_before=free_before,
        )

    def used_bytes(self) -> int:
        """Return what this process has taken of the device, everything included. Only where it is alone."""
        assert self.is_alone
        free, _ = check(driver.cuMemGetInfo(), "cuMemGetInfo")
        return self._free_before - int(free)


def operators_directory(kernel_cache: Path, architecture: str) -> Path:
    """Return where FlashInfer's operators of an architecture are kept, beside our own kernels."""
    return kernel_cache / f"flashinfer-{FLASHINFER_VERSION}-{architecture.replace('_', '')}"


def architecture(ordinal: int) -> str:
    """Return the device's architecture as compilers spell it, with its own features where it has them."""
    major, minor = torch.cuda.get_device_capability(ordinal)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def _free_without_context(ordinal: int) -> int:
    import pynvml

    device = check(driver.cuDeviceGet(ordinal), f"device {ordinal}")
    bus = check(driver.cuDeviceGetPCIBusId(32, device), "PCI address")
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus.split(b"\0")[0])
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    finally:
        pynvml.nvmlShutdown()
