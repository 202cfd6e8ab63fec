"""Products with weights: our own kernels for few rows of bf16 (gemv.cu), cuBLAS for the rest."""

import torch
from torch.nn import functional

from worker.backends.cuda.cublaslt import Algorithm, CublasLt
from worker.backends.cuda.gemm_table import GemmTable
from worker.backends.cuda.launch import Kernel, Kernels
from worker.backends.cuda.linear_table import CUBLAS, GEMV_ROWS, Choice, choose

_FILE = "gemv"
_SIGNATURE = "PPPiiiii"
_TILE = 16
_WARP = 32
_PIECE_BYTES = 16
_LINE_BYTES = 128


class Linear:
    """``x @ weight.T``. Owns the kernels it has used; outputs are fresh tensors of torch's allocator."""

    def __init__(
        self, kernels: Kernels, lt: CublasLt | None = None, table: GemmTable | None = None
    ) -> None:
        """``lt``, ``table``: algorithms measured on this machine; None: cuBLAS's own choice."""
        self._kernels, self._lt, self._table = kernels, lt, table
        self._known: dict[str, _Gemv] = {}
        self._choices: dict[tuple[int, int, int, bool], Choice] = {}

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return [rows, out] of x [rows, k] and weight [out, k]; ``out_dtype``: float32, or that of x."""
        dtype = out_dtype or x.dtype
        choice = self._choice(x, weight, weight.shape[0], gated=False)
        if choice.kernel == CUBLAS:
            return self._by_cublas(x, weight, dtype)
        out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
        self.run(choice, x, weight, out)
        return out

    def add(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Add ``x @ weight.T`` to ``residual`` [rows, out] in place, in one product of cuBLAS's."""
        algorithm = self._measured(x, weight, residual.dtype)
        if algorithm is not None and residual.is_contiguous():
            assert self._lt is not None
            if self._lt.multiply(x, weight, residual, algorithm, adds=True):
                return
        residual.addmm_(x, weight.t())

    def _by_cublas(self, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        algorithm = self._measured(x, weight, dtype)
        if algorithm is not None:
            assert self._lt is not None
            out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
            if self._lt.multiply(x, weight, out, algorithm):
                return out
        if dtype == x.dtype:
            return functional.linear(x, weight)
        return torch.mm(x, weight.t(), out_dtype=dtype)

    def _measured(self, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> Algorithm | None:
        if self._lt is None or self._table is None or x.dtype != torch.bfloat16 or not x.is_contiguous():
            return None
        return self._table.get(x.shape[0], weight.shape[0], x.shape[1], dtype)

    def gated(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """Return silu(gate) · up of ``x @ weight.T`` with weight [gate | up], in one kernel.

        None where that is not the fastest way: multiply, then gate.
        """
        outputs = weight.shape[0] // 2
        choice = self._choice(x, weight, outputs, gated=True)
        if choice.kernel == CUBLAS:
            return None
        out = x.new_empty(x.shape[0], outputs)
        self.run(choice, x, weight, out)
        return out

    def run(self, choice: Choice, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Write the product to ``out`` by one of our kernels, which must be able to: see ``fits``."""
        kernel = self._known.get(choice.kernel)
        if kernel is None:
            kernel = self._known[choice.kernel] = _Gemv(self._kernels, choice.kernel)
        kernel(x, weight, out, choice.ahead_mib)

    def _choice(self, x: torch.Tensor, weight: torch.Tensor, outputs: int, *, gated: bool) -> Choice:
        if not fits(x, weight):
            return Choice(CUBLAS)
        key = (x.shape[0], outputs, x.shape[1], gated)
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = choose(key[0], outputs, key[2], gated=gated)
        return choice


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether our kernels can multiply these: 1 to 32 rows of bf16, 16 bytes at a time."""
    return (
        1 <= x.shape[0] <= GEMV_ROWS
        and x.dtype == weight.dtype == torch.bfloat16
        and x.shape[1] % 8 == 0
        and x.is_contiguous()
        and weight.is_contiguous()
        and (x.data_ptr() | weight.data_ptr()) % _PIECE_BYTES == 0
    )


class _Gemv:
    """One of gemv.cu's kernels; what its name says decides its grid."""

    def __init__(self, kernels: Kernels, name: str) -> None:
        kind, *numbers = name.rsplit("_", 5)
        k_warps, n_warps, tiles, column_tiles, depth = map(int, numbers)
        self._kernel: Kernel = kernels.get(_FILE, name, _SIGNATURE)
        self._is_gated = "gated" in kind
        self._rows = 8 * column_tiles
        self._threads = _WARP * k_warps * n_warps
        self._weight_rows = _TILE * tiles * n_warps
        self._line_elements = _LINE_BYTES // 2 * k_warps
        self._shared_bytes = depth * tiles * 2 * self._threads * _PIECE_BYTES if "ring" in kind else 0

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, ahead_mib: int) -> None:
        rows, k = x.shape
        outputs = out.shape[1]
        assert rows <= self._rows, (rows, self._rows)
        blocks = -(-weight.shape[0] // self._weight_rows)
        if self._is_gated:
            blocks = -(-outputs // (self._weight_rows // 2))
        ahead = 0
        if ahead_mib:
            # Lines of each weight row a warp: all blocks together ask for about ahead_mib.
            a_line = blocks * self._weight_rows * self._line_elements * 2
            ahead = min((ahead_mib << 20) // a_line, -(-k // self._line_elements))
        self._kernel(
            (blocks,),
            self._threads,
            (x, weight, out, rows, outputs, k, ahead, out.dtype == torch.float32),
            self._shared_bytes,
        )
