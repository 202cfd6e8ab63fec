"""The CUDA driver, with every return code looked at."""

from typing import Any

from cuda.bindings import driver

from protocol.errors import TandemError


class CudaError(TandemError):
    """A driver call failed; the process's context may be lost with it."""

    code = "cuda"


def check(result: tuple[Any, ...], what: str) -> Any:
    """Return what a driver call gives beside its code. Errors: ``CudaError`` naming ``what``."""
    status, *found = result
    if status != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(status)
        _, text = driver.cuGetErrorString(status)
        raise CudaError(f"{what}: {(name or b'?').decode()}, {(text or b'').decode()}")
    if not found:
        return None
    return found[0] if len(found) == 1 else tuple(found)
