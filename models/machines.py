"""GPUs and the links between them, as figures: what a plan without any GPU counts with.

Peaks are those of NVIDIA's data sheets (A100: nvidia-a100-datasheet 2021; H100 and H200: their data
sheets of 2023 and 2024, SXM; B200: HGX B200 in the Blackwell data sheet of 2025), dense and per direction.
What programs reach of a peak was measured on one H200 (2026-11-23) and is taken to be the same part of it
on the others: 4.66 TB/s read of 4.8, 785 TFLOP/s in bfloat16 of 989, 396 GB/s over NVLink of 450, 55.5 GB/s
from pinned host memory of 64.
"""

import math
import re
from typing import Final

import msgspec

from protocol.errors import InvalidRequestError

GIB: Final = 1 << 30
MOST_GPUS: Final = 256

_READ_PART: Final = 4.66 / 4.8
_MATMUL_PART: Final = 785 / 989
_NVLINK_PART: Final = 396 / 450
_PCIE_PART: Final = 55.5 / 64


class Link(msgspec.Struct, frozen=True):
    """What carries messages between ranks."""

    name: str
    bytes_s: float
    """That one GPU sends, while it receives as much."""
    latency_s: float
    """Of a short collective: what it takes however little is sent."""


class Gpu(msgspec.Struct, frozen=True):
    """One GPU: what programs reach, not its data sheet."""

    name: str
    usable_bytes: int
    """What the driver gives to programs, all together."""
    read_bytes_s: float
    """Reading its own memory."""
    matmul_flops: float
    """Large products in bfloat16."""
    nvlink: Link
    host_bytes_s: float
    """From pinned host memory."""


class Machines(msgspec.Struct, frozen=True):
    """Equal machines of equal GPUs; ranks fill them one after another."""

    gpu: Gpu
    machines: int
    gpus_each: int
    network: Link

    @property
    def num_gpus(self) -> int:
        """GPUs in all."""
        return self.machines * self.gpus_each

    def link(self, ranks: range) -> Link:
        """Return the slowest link that the ranks need to talk to each other."""
        if len({rank // self.gpus_each for rank in ranks}) > 1:
            return self.network
        return self.gpu.nvlink

    def __str__(self) -> str:
        each = f"{self.gpus_each} x {self.gpu.name}"
        return each if self.machines == 1 else f"{self.machines} machines of {each}, {self.network.name}"


def _gpu(
    name: str, gib: float, read_tb_s: float, tflops: float, nvlink_gb_s: float, pcie_gb_s: float
) -> Gpu:
    return Gpu(
        name=name,
        usable_bytes=int(gib * GIB),
        read_bytes_s=read_tb_s * 1e12 * _READ_PART,
        matmul_flops=tflops * 1e12 * _MATMUL_PART,
        # The one-shot all-reduce of two H200s, 8 KiB in a graph.
        nvlink=Link("NVLink", nvlink_gb_s * 1e9 * _NVLINK_PART, 6.5e-6),
        host_bytes_s=pcie_gb_s * 1e9 * _PCIE_PART,
    )


GPUS: Final = {
    gpu.name: gpu
    for gpu in (
        # Usable: H200 and H100 as measured and reported here; A100 and B200 as torch reports their
        # totals in public logs (39.4, 79.1 and 178.3 GiB).
        _gpu("A100-40GB", 39.4, 1.555, 312, 300, 32),
        _gpu("A100-80GB", 79.1, 2.039, 312, 300, 32),
        _gpu("H100-80GB", 79.6, 3.35, 989, 450, 64),
        _gpu("H200-141GB", 139.8, 4.8, 989, 450, 64),
        _gpu("B200-180GB", 178.3, 8.0, 2250, 900, 64),
    )
}
"""By name."""

_SHORT: Final = {
    "A100": "A100-80GB",
    "H100": "H100-80GB",
    "H200": "H200-141GB",
    "B200": "B200-180GB",
}

NETWORKS: Final = {
    link.name.lower(): link
    for link in (
        # One 400 Gbit/s port a GPU, as in HGX machines: NDR InfiniBand (ConnectX-7) or 400 Gbit Ethernet.
        # The latency of a short all-reduce over NCCL between machines is an estimate, not measured here.
        Link("InfiniBand", 50e9, 25e-6),
        Link("RoCE", 50e9, 35e-6),
    )
}
"""Between machines, by name in small letters."""

DRIVE_BYTES_S: Final = 6.8e9
"""A data centre's PCIe 4 NVMe drive, sequential reads (Samsung PM9A3, data sheet)."""


def check_drive(drive_bytes_s: float) -> None:
    """Refuse a drive that reads nothing, or no number at all (``InvalidRequestError``)."""
    if not 0 < drive_bytes_s < math.inf:
        raise InvalidRequestError(
            f"a drive of {drive_bytes_s / 1e9:g} GB/s reads nothing: give GB/s, as in 6.8",
            field="drive_gbs",
        )


_FORM: Final = re.compile(
    r"(?:(\d{1,4})x)?(?:(\d{1,4})x)?([a-z][a-z0-9]*(?:-\d+gb)?)(?:@([a-z]+))?", re.ASCII
)


def parse_gpus(text: str) -> Machines:
    """Return the machines of ``8xH100-80GB``, ``H200``, ``2x8xH100-80GB`` or ``2x8xH100@roce``.

    The number before the name is GPUs a machine, the one before that machines; behind ``@`` what joins
    machines. Errors: ``InvalidRequestError`` saying what is known.
    """
    form = _FORM.fullmatch(text.strip().lower())
    if form is None:
        raise _bad(text, "is not of the form 8xH100-80GB, 2x8xH100-80GB or 2x8xH100-80GB@roce")
    outer, inner, name, network = form.groups()
    machines, each = (int(outer), int(inner)) if inner else (1, int(outer or 1))
    if machines < 1 or each < 1:
        raise _bad(text, "has no GPUs: counts are at least 1")
    if machines * each > MOST_GPUS:
        raise _bad(text, f"is {machines * each} GPUs: an instance has at most {MOST_GPUS}")
    by_name = {known.lower(): gpu for known, gpu in GPUS.items()}
    by_name |= {short.lower(): GPUS[known] for short, known in _SHORT.items()}
    if name not in by_name:
        raise _bad(text, f"names a GPU that is not known; {', '.join(GPUS)} are")
    if network is not None and network not in NETWORKS:
        known = ", ".join(link.name for link in NETWORKS.values())
        raise _bad(text, f"joins machines by {network!r}; {known} are known")
    if network is not None and machines == 1:
        raise _bad(text, "is one machine, which needs no network")
    return Machines(by_name[name], machines, each, NETWORKS[network or "infiniband"])


def _bad(text: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"--gpus {text[:80]!r} {what}", field="gpus")


def gpu_of_driver(name: str, total_bytes: int) -> Gpu | None:
    """Return the GPU that the driver calls ``name`` (``NVIDIA H100 80GB HBM3``), None where not known."""
    words = name.replace("-", " ").split()
    same = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words]
    return min(same, key=lambda gpu: abs(gpu.usable_bytes - total_bytes), default=None)
