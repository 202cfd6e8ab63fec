"""cuBLASLt by algorithms of our choice: right, kept, and read back."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cuda.bindings")

from worker.backends.cuda import gemm_table  # noqa: E402
from worker.backends.cuda.cublaslt import CublasLt  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "outputs", "k"), [(1, 64, 64), (33, 960, 576), (300, 1000, 256)])
def test_every_proposal_multiplies(rows: int, outputs: int, k: int, dtype: torch.dtype) -> None:
    torch.cuda.set_device(0)
    lt = CublasLt(torch.device("cuda", 0))
    x = torch.randn(rows, k, device="cuda").to(torch.bfloat16)
    weight = torch.randn(outputs, k, device="cuda").to(torch.bfloat16)
    expected = x.double() @ weight.double().t()
    proposals = lt.proposals(rows, outputs, k, dtype)
    assert proposals
    for algorithm in proposals:
        out = torch.full((rows, outputs), float("nan"), device="cuda", dtype=dtype)
        assert lt.multiply(x, weight, out, algorithm)
        error = (out.double() - expected).norm() / expected.norm()
        assert error < (4e-3 if dtype == torch.bfloat16 else 1e-5)
        before = torch.randn(rows, outputs, device="cuda").mul_(k**0.5).to(dtype)
        out = before.clone()
        assert lt.multiply(x, weight, out, algorithm, adds=True)
        total = expected + before.double()
        assert (out.double() - total).norm() / total.norm() < (4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_a_table_is_measured_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.cuda.set_device(0)
    monkeypatch.setattr(gemm_table, "LARGE_ROWS", (1536,))
    monkeypatch.setattr(gemm_table, "SIZES", (16, 64))
    monkeypatch.setattr(gemm_table, "_BYTES_APART", 1 << 20)
    lt = CublasLt(torch.device("cuda", 0))
    lines = list(gemm_table.measure(lt, [(256, 128, torch.bfloat16)], 8))
    path = gemm_table.table_path(tmp_path, "NVIDIA H200", lt.version)
    gemm_table.write(path, lines)
    table = gemm_table.GemmTable(gemm_table.read(path))
    assert {line.rows for line in lines} == {1, 2, 4, 8, 16, 64, 1536}
    assert table.get(40, 256, 128, torch.bfloat16) == table.get(64, 256, 128, torch.bfloat16)
    assert table.get(9000, 256, 128, torch.bfloat16) is not None
    assert table.get(40, 256, 128, torch.float32) is None
    assert gemm_table.read(tmp_path / "none.json") == []
