"""Launches of our kernels on torch's current stream.

A launch from Python costs what building its arguments costs, so they are packed by one ``struct`` call
into memory that belongs to the kernel. Kernels are launched with programmatic serialisation: each may
start while the one before it drains, and waits by itself (``wait_for_previous``) before it touches what
others write. Captured into a graph, that becomes an edge of the same kind.
"""

import ctypes
import struct
from collections.abc import Sequence

import torch
from cuda.bindings import driver

from worker.backends.cuda.compiler import KernelCache
from worker.backends.cuda.driver import CudaError, check

_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_ubyte * 64))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Kernel:
    """One entry point. Used by one thread."""

    def __init__(self, function: int, name: str, signature: str) -> None:
        """Prepare launches; ``signature`` has a letter per argument.

        ``P`` a pointer (tensor or address), ``i`` int, ``I`` unsigned int, ``q`` long long, ``Q`` unsigned
        long long, ``f`` float, ``d`` double.
        """
        self.name = name
        self._function = ctypes.c_void_p(function)
        self._ordinal = torch.cuda.current_device()
        # Each argument has eight bytes of its own.
        self._layout = struct.Struct("=" + "".join(_SLOTS[letter] for letter in signature))
        self._values = ctypes.create_string_buffer(8 * len(signature))
        base = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * len(signature))(*(base + 8 * i for i in range(len(signature))))
        self._attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION, 0)
        self._attribute.value[0] = 1
        self._config = _Config(attributes=ctypes.pointer(self._attribute), num_attributes=1)
        self._launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        # What a kernel may ask for unasked depends on the shared memory that its text declares.
        self._shared_limit = 0

    def __call__(
        self,
        grid: Sequence[int],
        block: int,
        arguments: Sequence[torch.Tensor | int | float],
        shared_bytes: int = 0,
    ) -> None:
        """Launch ``grid`` (x, or x and y, or all three) blocks of ``block`` threads on the current stream.

        Errors: ``CudaError``.
        """
        self._layout.pack_into(
            self._values, 0, *(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
        )
        if shared_bytes > self._shared_limit:
            self._raise_shared_limit(shared_bytes)
        config = self._config
        config.grid[:] = (*grid, 1, 1)[:3]
        config.block[:] = (block, 1, 1)
        config.shared_bytes = shared_bytes
        # The public way to it asks the driver several times whether there is a GPU at all.
        config.stream = torch._C._cuda_getCurrentRawStream(self._ordinal)  # noqa: SLF001
        status = self._launch(ctypes.byref(config), self._function, self._pointers, None)
        if status:
            check((driver.CUresult(status),), f"launch of {self.name}")

    def _raise_shared_limit(self, num_bytes: int) -> None:
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        function = driver.CUfunction(self._function.value)
        check(driver.cuFuncSetAttribute(function, limit, num_bytes), f"shared memory of {self.name}")
        self._shared_limit = num_bytes


_SLOTS = {"P": "Q", "Q": "Q", "q": "q", "i": "i4x", "I": "I4x", "f": "f4x", "d": "d"}


class Kernels:
    """The modules of one device, loaded as they are asked for. Needs a current context."""

    def __init__(self, cache: KernelCache) -> None:
        self._cache = cache
        self._modules: dict[str, driver.CUmodule] = {}
        self.compiled: list[str] = []
        """Files that the cache did not have: a boot says so."""

    def get(self, file: str, name: str, signature: str) -> Kernel:
        """Return an entry point of a kernel file. Errors: ``CudaError``."""
        if file not in self._modules:
            code, was_compiled = self._cache.load(file)
            if was_compiled:
                self.compiled.append(file)
            self._modules[file] = check(driver.cuModuleLoadData(code), f"loading {file}")
        try:
            function = check(driver.cuModuleGetFunction(self._modules[file], name.encode()), name)
        except CudaError as error:
            raise CudaError(f"{file}.cu has no kernel {name}: {error.message}") from None
        # Neighbours overlap only where they want the same split of a multiprocessor's memory: all want the
        # most shared memory, as cuBLAS's and the products' kernels do.
        split = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        check(driver.cuFuncSetAttribute(function, split, 100), name)
        return Kernel(int(function), name, signature)
