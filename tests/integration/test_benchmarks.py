"""Benchmarks give figures of what they say, and end what they start."""

from pathlib import Path

from benchmarks import control_plane
from tests.tiny_llama import write_tiny_llama


def test_the_control_plane_is_measured_with_real_parts(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path)
    found = control_plane.measure(model, ranks=3, rows=8, connections=2, max_tokens=40, idle_s=0.5)
    assert found["tokens"] == 8 * 40
    # Every row wants a token in nearly every step, and nothing is planned for nobody.
    assert 40 <= found["steps"] + 1 <= 80
    assert 0 < found["step_us"]["median"] <= found["step_us"]["p99"] < 1e6
    assert 0 < found["cpu_us_per_token"] < 20_000
    assert found["idle_percent"] < 20


def test_a_demand_that_is_not_met_is_named() -> None:
    slow = {"rows": 256, "cpu_us_per_token": 13.0, "step_us": {"median": 1200.0}, "idle_percent": 0.5}
    assert [text.split()[0] for text in control_plane.missed(slow)] == ["cpu_us_per_token", "step_us"]
    assert control_plane.missed(slow | {"rows": 64}) == []
