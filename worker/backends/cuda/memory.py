"""Device memory by virtual ranges: reserved first, mapped piece by piece, shareable by descriptor.

A range costs nothing until it is mapped, and what was captured against its addresses stays right when
more of it is mapped later. Every piece is made with a POSIX-fd handle type, so that it can outlive its
maker in another process's hands.
CUDA driver API, "Virtual Memory Management".
"""

from dataclasses import dataclass

import torch
from cuda.bindings import driver

from protocol.errors import MemoryBudgetError
from worker.backends.cuda.driver import CudaError, check

_POSIX_FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_OUT_OF_MEMORY = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY


@dataclass(frozen=True, slots=True)
class _Bytes:
    """What torch makes a tensor of without copying: https://numba.readthedocs.io, CUDA Array Interface."""

    address: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }


class DeviceRange:
    """One reserved range and what is mapped of it. ``Region`` of the tensors in it."""

    def __init__(self, ordinal: int, size: int) -> None:
        """Reserve; ``size`` is rounded up to the device's granule. Needs a current context."""
        self._device = torch.device("cuda", ordinal)
        self._properties = _properties(ordinal)
        self.granule = granule_bytes(ordinal)
        self.size = _up(max(size, 1), self.granule)
        self._base = int(check(driver.cuMemAddressReserve(self.size, 0, 0, 0), "reserving addresses"))
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._mapped: list[tuple[int, int]] = []
        self.mapped_bytes = 0

    def map(self, offset: int, size: int) -> None:
        """Back [offset, offset + size) with memory; both are multiples of the granule.

        Errors: ``MemoryBudgetError`` where the device has no more.
        """
        assert offset % self.granule == size % self.granule == 0, (offset, size, self.granule)
        assert offset + size <= self.size, (offset, size, self.size)
        if not size:
            return
        status, handle = driver.cuMemCreate(size, self._properties, 0)
        if status == _OUT_OF_MEMORY:
            raise MemoryBudgetError(
                f"the device has no {size / 2**20:.0f} MiB left, which the memory plan counts on: someone "
                "else uses it, or --memory is more than it has",
                field="memory",
            )
        check((status,), "making device memory")
        address = driver.CUdeviceptr(self._base + offset)
        try:
            check(driver.cuMemMap(address, size, 0, handle, 0), "mapping device memory")
        finally:
            # The mapping holds the memory from here on.
            check(driver.cuMemRelease(handle), "releasing a memory handle")
        check(driver.cuMemSetAccess(address, size, [self._access], 1), "opening device memory")
        self._mapped.append((offset, size))
        self.mapped_bytes += size

    def view(self, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
        """See ``Region.view``; the first byte must be mapped, the others before they are used."""
        size = count * dtype.itemsize
        assert offset + size <= self.size, (offset, size, self.size)
        whole = torch.as_tensor(_Bytes(self._base + offset, size), device=self._device)
        return whole.view(dtype)

    def close(self) -> None:
        """Give memory and addresses back; no view may be used any more."""
        for offset, size in self._mapped:
            check(driver.cuMemUnmap(driver.CUdeviceptr(self._base + offset), size), "unmapping")
        self._mapped = []
        check(driver.cuMemAddressFree(driver.CUdeviceptr(self._base), self.size), "freeing addresses")


def borrowed(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` without holding its memory: for what a graph pool keeps, and reuses."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    whole = torch.as_tensor(_Bytes(x.data_ptr(), extent * x.element_size()), device=x.device)
    return whole.view(x.dtype).as_strided(x.shape, x.stride())


def granule_bytes(ordinal: int) -> int:
    """Return what sizes and offsets of mappings must be multiples of."""
    flag = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(check(driver.cuMemGetAllocationGranularity(_properties(ordinal), flag), "granularity"))


def free_bytes() -> int:
    """Return what the current device has left, whoever took the rest."""
    free, _ = check(driver.cuMemGetInfo(), "cuMemGetInfo")
    return int(free)


def _properties(ordinal: int) -> driver.CUmemAllocationProp:
    found = driver.CUmemAllocationProp()
    found.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    found.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    found.location.id = ordinal
    found.requestedHandleTypes = _POSIX_FD
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
    try:
        has_rdma = check(driver.cuDeviceGetAttribute(attribute, ordinal), "RDMA attribute")
    except CudaError:
        has_rdma = 0
    found.allocFlags.gpuDirectRDMACapable = 1 if has_rdma else 0
    return found


def _up(size: int, granule: int) -> int:
    return -(-size // granule) * granule
