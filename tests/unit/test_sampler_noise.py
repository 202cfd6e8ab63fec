"""The noise is uniform, independent over seed, position and id, and the same however it is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker import noise

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
CHI_SQUARE_SIGMAS = 5.0
"""Of a normal approximation; all seeds are fixed, so a pass stays a pass."""


def bits_by_definition(seed: int, position: int, token: int) -> int:
    """The docstring of ``worker.noise`` in whole numbers."""

    def splitmix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK64
        return z ^ (z >> 31)

    key = splitmix((splitmix(seed) + (position + 1) * 0x9E3779B97F4A7C15) & MASK64)
    h = token * 0x9E3779B1 & MASK32
    h ^= h >> 16
    h = h * 0x85EBCA6B & MASK32
    h ^= h >> 13
    h ^= key & MASK32
    h ^= h >> 16
    h = (h * 0x85EBCA6B + (key >> 32)) & MASK32
    h ^= h >> 13
    h = h * 0xC2B2AE35 & MASK32
    return h ^ (h >> 16)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1), st.lists(st.integers(0, 2**31 - 1), min_size=1)
)
def test_bits_are_those_of_the_definition(seed: int, position: int, tokens: list[int]) -> None:
    found = noise.bits(seed, position, noise.hash_ids(torch.tensor(tokens)))
    assert [b & MASK32 for b in found.tolist()] == [bits_by_definition(seed, position, t) for t in tokens]


def chi_square_sigmas(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def draws(along: str, count: int) -> np.ndarray:
    """Uniforms along one of the three coordinates, the other two at rest."""
    if along == "id":
        return noise.uniform(3, 5, noise.hash_ids(torch.arange(count))).numpy()
    one = noise.hash_ids(torch.tensor([77]))
    pairs = ((seed, 5) if along == "seed" else (3, seed) for seed in range(count))
    return np.array([noise.uniform(seed, position, one).item() for seed, position in pairs])


@pytest.mark.parametrize(("along", "count"), [("id", 200_000), ("seed", 8_000), ("position", 8_000)])
def test_uniform_and_serially_independent_along(along: str, count: int) -> None:
    u = draws(along, count)
    assert u.min() > 0.0
    assert u.max() < 1.0
    singles = np.histogram(u, bins=64, range=(0, 1))[0]
    assert abs(chi_square_sigmas(singles)) < CHI_SQUARE_SIGMAS
    for lag in (1, 2, 16):
        pairs = np.histogram2d(u[:-lag], u[lag:], bins=16, range=((0, 1), (0, 1)))[0]
        assert abs(chi_square_sigmas(pairs)) < CHI_SQUARE_SIGMAS, lag


def test_neighbouring_seeds_and_positions_are_independent() -> None:
    ids = noise.hash_ids(torch.arange(100_000))
    base = noise.uniform(12, 40, ids).numpy()
    for seed, position in ((13, 40), (12, 41), (13, 41), (40, 12), (12 + 2**32, 40), (12 ^ 2**62, 40)):
        other = noise.uniform(seed, position, ids).numpy()
        table = np.histogram2d(base, other, bins=16, range=((0, 1), (0, 1)))[0]
        assert abs(chi_square_sigmas(table)) < CHI_SQUARE_SIGMAS, (seed, position)


@pytest.mark.parametrize("what", ["seed", "position", "id"])
def test_one_bit_of_any_input_changes_half_of_the_output(what: str) -> None:
    ids = torch.arange(4000)
    base = noise.bits(9, 100, noise.hash_ids(ids))
    for bit in range({"seed": 63, "position": 20, "id": 18}[what]):
        flip = 1 << bit
        if what == "seed":
            other = noise.bits(9 ^ flip, 100, noise.hash_ids(ids))
        elif what == "position":
            other = noise.bits(9, 100 ^ flip, noise.hash_ids(ids))
        else:
            other = noise.bits(9, 100, noise.hash_ids(ids ^ flip))
        changed = (base ^ other).numpy().view(np.uint32)
        share = np.unpackbits(changed.view(np.uint8)).reshape(len(ids), 32).mean(axis=0)
        assert abs(share.mean() - 0.5) < 0.02, bit
        assert share.min() > 0.4, bit
        assert share.max() < 0.6, bit


def test_any_cut_of_the_vocabulary_gives_the_same_bits_of_noise() -> None:
    whole = noise.gumbel(5, 9, noise.hash_ids(torch.arange(4099)))
    torch.manual_seed(0)
    for _ in range(100):
        first, last = sorted(torch.randint(0, 4100, (2,)).tolist())
        part = noise.gumbel(5, 9, noise.hash_ids(torch.arange(first, last)))
        assert torch.equal(part, whole[first:last])
        some = torch.randperm(4099)[: last - first]
        assert torch.equal(noise.gumbel(5, 9, noise.hash_ids(some)), whole[some])


def test_gumbel_has_its_moments_and_its_tails() -> None:
    g = noise.gumbel(1, 2, noise.hash_ids(torch.arange(1 << 20))).double()
    assert g.isfinite().all()
    assert abs(g.mean().item() - np.euler_gamma) < 0.01
    assert abs(g.var().item() - np.pi**2 / 6) < 0.02
    # The expected number above x is about n exp(-x).
    assert 5 <= (g > 11.0).sum().item() <= 35
