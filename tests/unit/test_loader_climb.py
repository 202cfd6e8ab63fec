"""The hill climb against drives of known shape: it must end near their best, from any start."""

import random
from collections.abc import Callable

import pytest

from loader.climb import (
    LEAST_BLOCK_BYTES,
    MOST_BLOCK_BYTES,
    RING_BYTES,
    SETTLE_S,
    WINDOW_S,
    Climb,
    Meter,
    Setting,
)

Drive = Callable[[Setting], float]

DRIVES: dict[str, Drive] = {
    # Bytes a second, in GB: one reader is best, 32 get less than 60 % of it.
    "virtual disk": lambda s: 2.6 / (1 + 0.023 * (s.threads - 1)),
    # A copy a core, up to 16; more threads than cores take each other's turns.
    "tmpfs": lambda s: 4.2 * min(s.threads, 16) * (1 if s.threads <= 16 else 0.8),
    # Latency: each request takes its time, whatever its size, until the link is full.
    "network": lambda s: min(10.0, s.threads * s.block_bytes / 0.015 / 1e9),
    "NVMe": lambda s: min(28.0, 3.1 * s.threads) * (1 if s.block_bytes > LEAST_BLOCK_BYTES else 0.85),
    "flat": lambda _: 3.0,
}


def settings() -> list[Setting]:
    return [
        Setting(threads, block)
        for threads in (1, 2, 4, 8, 16, 32)
        for block in (LEAST_BLOCK_BYTES, 2 * LEAST_BLOCK_BYTES, MOST_BLOCK_BYTES)
        if threads * block <= RING_BYTES
    ]


@pytest.mark.parametrize("start", [1, 4, 16, 32])
@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("noise", [0.0, 0.015])
def test_it_ends_near_the_best(drive: str, start: int, noise: float) -> None:
    random_ = random.Random(start)
    rate = DRIVES[drive]
    climb = Climb(start)
    for _ in range(25):
        assert climb.setting.threads * climb.setting.block_bytes <= RING_BYTES
        climb.observe(rate(climb.setting) * random_.uniform(1 - noise, 1 + noise))
    assert rate(climb.setting) >= 0.9 * max(map(rate, settings()))
    held = climb.setting
    for _ in range(20):
        climb.observe(rate(climb.setting) * random_.uniform(1 - noise, 1 + noise))
        assert climb.setting == held, "what is found is kept"


def test_it_searches_again_when_the_drive_changes() -> None:
    climb = Climb(4)
    for _ in range(25):
        climb.observe(DRIVES["tmpfs"](climb.setting))
    assert climb.setting.threads == 16
    for _ in range(25):
        climb.observe(DRIVES["virtual disk"](climb.setting))
    assert climb.setting.threads <= 2


@pytest.mark.parametrize("most", [1, 3, 5])
def test_no_more_threads_than_allowed(most: int) -> None:
    climb = Climb(8, most)
    for _ in range(20):
        assert 1 <= climb.setting.threads <= most
        climb.observe(float(climb.setting.threads))
    assert climb.setting.threads == most


def test_bytes_count_in_windows_and_not_right_after_a_change() -> None:
    climb = Climb(2)
    meter = Meter(climb, 10.0)
    assert not meter.add(100, 10.0 + WINDOW_S / 2)
    assert climb.setting.threads == 2
    assert meter.add(100, 10.0 + WINDOW_S + 1e-6)
    changed_s = 10.0 + WINDOW_S + 1e-6
    assert climb.setting.threads == 4
    assert not meter.add(1 << 40, changed_s + SETTLE_S / 2)
    # 900 a second where 1000 were: had the flood above counted, this would be kept.
    assert meter.add(180, changed_s + SETTLE_S + WINDOW_S + 1e-6)
    assert climb.setting.threads == 1
