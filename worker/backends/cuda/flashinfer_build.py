"""Build the FlashInfer operators that a model's attention needs; ``tandem warm`` does, a boot never.

Needs the flashinfer-python package, nvcc and ninja. FlashInfer's builder reads the architecture, its
scratch directory and the compilers from the environment once, when it is imported. So a process builds for
one kind of GPU, and its environment is set when it is started: ``FLASHINFER_CUDA_ARCH_LIST`` (``9.0a``),
``FLASHINFER_WORKSPACE_BASE`` (a scratch directory), ``CUDA_HOME``.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from protocol.errors import StorageError
from worker.backends.cuda.driver import CudaError
from worker.backends.cuda.flashinfer import prefill_name, xqa_name

_XQA_PAGES = (16, 32, 64, 128)
_LARGEST_XQA_DIM = 256
_LARGEST_XQA_RATIO = 32
_FA3_DIMS = (128,)
_FA2_DIMS = (64,)
_LATENT_DIMS = (192, 128)
_NO_POSITIONS = 0


@dataclass(frozen=True, slots=True)
class Operator:
    """One library: its name, and what describes it to FlashInfer's builder."""

    name: str
    describe: Callable[[], Any]


def operators_of(dim: int, ratio: int, block_tokens: int) -> tuple[Operator, ...]:
    """Return what bf16 attention uses for a head dim and so many query heads of a KV head.

    Empty where only our own kernels serve the shape.
    """
    operators = []
    fits_xqa = dim % 16 == 0 and dim <= _LARGEST_XQA_DIM and ratio <= _LARGEST_XQA_RATIO
    if fits_xqa and block_tokens in _XQA_PAGES:
        name = xqa_name(block_tokens, dim, ratio)
        operators.append(Operator(name, lambda: _describe_xqa(block_tokens, dim, ratio)))
    if dim in _FA3_DIMS:
        operators.append(Operator(prefill_name(dim, is_fa3=True), lambda: _describe_prefill("fa3", dim)))
    elif dim in _FA2_DIMS:
        operators.append(Operator(prefill_name(dim, is_fa3=False), lambda: _describe_prefill("fa2", dim)))
    return tuple(operators)


def latent_operators(dim: int, value_dim: int) -> tuple[Operator, ...]:
    """Return what bf16 attention over latents uses where it expands them to keys and values of such dims.

    Empty where only our own kernels serve the shape.
    """
    if (dim, value_dim) != _LATENT_DIMS:
        return ()
    name = prefill_name(dim, is_fa3=True, value_dim=value_dim)
    return (Operator(name, lambda: _describe_prefill("fa3", dim, value_dim)),)


def build(operators: tuple[Operator, ...], directory: Path) -> Iterator[tuple[str, bool]]:
    """Build what is missing in ``directory``; give each name and whether it had to be built.

    An operator takes 20 s to 6 min. Errors: ``CudaError`` with the builder's words; ``StorageError``.
    """
    for operator in operators:
        path = directory / operator.name / f"{operator.name}.so"
        if path.exists():
            yield operator.name, False
            continue
        try:
            specification = operator.describe()
            specification.build(verbose=False)
        except ImportError as error:
            raise CudaError(f"{operator.name} cannot be built without flashinfer-python: {error}") from None
        except RuntimeError as error:
            raise CudaError(f"{operator.name} cannot be built: {error}") from None
        assert specification.name == operator.name, (specification.name, operator.name)
        _put(Path(specification.jit_library_path), path)
        yield operator.name, True


def _describe_xqa(block_tokens: int, dim: int, ratio: int) -> Any:
    bf16 = torch.bfloat16
    builder = import_module("flashinfer.jit.xqa")
    return builder.gen_xqa_module(bf16, bf16, block_tokens, dim, ratio, False, bf16)


def _describe_prefill(kind: str, dim: int, value_dim: int | None = None) -> Any:
    bf16, values = torch.bfloat16, dim if value_dim is None else value_dim
    builder = import_module("flashinfer.jit.attention.modules")
    return builder.gen_batch_prefill_module(
        kind, bf16, bf16, bf16, torch.int32, dim, values, _NO_POSITIONS, False, False, False
    )


def _put(built: Path, path: Path) -> None:
    """Copy a library so that another process sees it whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file, built.open("rb") as source:
            shutil.copyfileobj(source, file)
        Path(file.name).replace(path)
    except OSError as error:
        raise StorageError(f"{path.parent} cannot be written: {error.strerror}") from None
