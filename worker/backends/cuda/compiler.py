"""Our kernels, compiled once per GPU kind and kept: a boot loads them and compiles nothing.

The key is everything that the machine code depends on: source, architecture, options, and the version
of NVIDIA's run-time compiler (NVRTC), which needs no toolkit. ``tandem warm`` fills the cache.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cuda.bindings import nvrtc

from protocol.errors import StorageError
from worker.backends.cuda.driver import CudaError

SOURCES = Path(__file__).with_name("kernels")
COMMON = "common.cuh"
TENSOR = "tensor.cuh"
_USE_TENSOR = ("attention", "collectives", "latent")
"""Files that ``TENSOR`` is put before too."""
_OPTIONS = ("--std=c++17", "-default-device", "--extra-device-vectorization")


def source_names() -> tuple[str, ...]:
    """Return the kernel files, without their suffix."""
    return tuple(sorted(path.stem for path in SOURCES.glob("*.cu")))


def source_of(name: str) -> bytes:
    """Return the text of a kernel file, with what it shares with others before it."""
    shared = (COMMON, TENSOR) if name in _USE_TENSOR else (COMMON,)
    return b"".join((SOURCES / file).read_bytes() for file in (*shared, f"{name}.cu"))


class KernelCache:
    """Compiled files of one architecture under a directory. Processes may share it."""

    def __init__(self, directory: Path, architecture: str) -> None:
        """``architecture``: as the compiler spells it, ``sm_90a``."""
        self._architecture = architecture
        self._directory = directory / architecture

    def load(self, name: str) -> tuple[bytes, bool]:
        """Return the machine code of a kernel file, and whether it had to be compiled.

        Errors: ``CudaError`` with the compiler's log; ``StorageError``.
        """
        source = source_of(name)
        path = self._directory / f"{name}-{self._key(source)}.cubin"
        if path.exists():
            return path.read_bytes(), False
        code = compile_source(source, f"{name}.cu", self._architecture)
        _write_whole(path, code)
        return code, True

    def warm(self) -> Iterator[tuple[str, bool]]:
        """Compile what is missing, side by side; give each file's name and whether it was."""
        names = source_names()
        # The compiler lets go of the interpreter while it works.
        with ThreadPoolExecutor(len(names)) as pool:
            yield from zip(names, (was_built for _, was_built in pool.map(self.load, names)), strict=True)

    def _key(self, source: bytes) -> str:
        version = _check(nvrtc.nvrtcVersion(), "nvrtcVersion")
        facts = repr((version, self._architecture, _OPTIONS)).encode()
        return hashlib.sha256(facts + source).hexdigest()[:20]


def compile_source(source: bytes, name: str, architecture: str) -> bytes:
    """Return machine code. Errors: ``CudaError`` with the compiler's log."""
    program = _check(nvrtc.nvrtcCreateProgram(source, name.encode(), 0, None, None), "nvrtcCreateProgram")
    try:
        options = [option.encode() for option in (*_OPTIONS, f"--gpu-architecture={architecture}")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
            _check(nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
            raise CudaError(f"{name} does not compile for {architecture}:\n{log.decode(errors='replace')}")
        code: bytes = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
        _check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _check(result: tuple[Any, ...], what: str) -> Any:
    status, *found = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CudaError(f"{what}: {status}")
    return found[0] if len(found) == 1 else tuple(found)


def _write_whole(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(made).replace(path)
    except OSError as error:
        raise StorageError(f"the kernel cache {path.parent} cannot be written: {error.strerror}") from None
