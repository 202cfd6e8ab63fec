"""``benchmarks/loading.py``: what it measures is what it says."""

import json
from pathlib import Path

import pytest

from benchmarks import loading
from tests.tiny_llama import write_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=4)


@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["tandem", "safetensors"])
def test_a_loader_has_the_bytes_of_a_rank(
    name: str, tp: int, state: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loading.child(tiny, name, tp, state)
    found = json.loads(capsys.readouterr().out)
    if "missing" in found:
        assert state == "cold"
        assert "tmpfs" in found["missing"]
        return
    tensors = loading.Case(tiny, tp).checkpoint.tensors
    whole = sum(tensor.length for tensor in tensors.values())
    # A share of what is read, or a slice of each tensor and norms whole: both a half, nearly.
    assert whole / tp * 0.9 <= found["bytes"] <= whole / tp * 1.1
    assert found["seconds"] > 0


def test_one_that_is_not_here_is_missing(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(_: loading.Case) -> loading.Work:
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(loading.LOADERS, "instanttensor", absent)
    loading.child(tiny, "instanttensor", 1, "warm")
    assert json.loads(capsys.readouterr().out) == {"missing": "No module named 'peer'"}


def test_figures_are_held_against_the_best_plain_read() -> None:
    def run(seconds: float) -> dict[str, float]:
        return {"bytes": 2e9, "seconds": seconds, "cpu_s": seconds, "peak_bytes": 1 << 30}

    runs = {"plain-1": [run(2.0)], "plain-4": [run(1.0)], "tandem": [run(1.25), run(1.25), run(9.0)]}
    figures = {f.name + f.unit: f for f in loading._figures("cold whole", runs)}
    assert "cold whole, plain-1GB/s" not in figures
    ours = figures["cold whole, tandemGB/s"]
    assert ours.value == pytest.approx(1.6)
    assert ours.ratio == pytest.approx(0.8)
