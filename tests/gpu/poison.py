"""What the kernels' tests share: compiled kernels, and outputs that are rubbish until written."""

from pathlib import Path

import pytest
import torch


def load_kernels(directory: Path):
    """Return ``Kernels`` of the current device, compiled into ``directory``."""
    pytest.importorskip("cuda.bindings")
    from worker.backends.cuda.compiler import KernelCache
    from worker.backends.cuda.launch import Kernels

    torch.zeros(1, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    return Kernels(KernelCache(directory, f"sm_{major}{minor}{'a' if major >= 9 else ''}"))


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch leaves uninitialised: NaN, or a number no index has."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(1 << 30))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoil(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: spoil(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: spoil(new_empty(*a, **k)))


def assert_near(got: torch.Tensor, want: torch.Tensor, relative: float, absolute: float) -> None:
    """``want`` is float64; a NaN is far from everything."""
    assert got.shape == want.shape, (got.shape, want.shape)
    excess = (got.double() - want).abs() - relative * want.abs() - absolute
    assert bool((excess <= 0).all()), f"off by {excess.nan_to_num(float('inf')).max().item():.3g} too much"
