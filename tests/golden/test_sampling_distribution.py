"""Draws follow the exact softmax, with each filter and with filters together (chi-square)."""

import numpy as np
import pytest
import torch

from protocol.sampling import SamplingParams
from protocol.topology import Topology
from tests.unit import sampler_twin as twin
from tests.unit.comm_layouts import on_all_ranks
from tests.unit.test_sampler_draws import shard
from worker.comm import Communicator
from worker.sampler import RowSampling, Sampler

VOCAB = 17
LOGITS = torch.tensor(
    [2.0, 1.5, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 3.0, 2.5, -2.0, 0.2, 0.7, 1.1, -0.3, 2.2, 0.9]
)
BATCH = 250
SIGMAS = 5.0

CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.4},
    "very hot": {"temperature": 100.0},
    "top-k": {"top_k": 5},
    "top-k through a tie": {"top_k": 6},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.2},
    "top-k and top-p": {"top_k": 9, "top_p": 0.7},
    "top-k and min-p": {"top_k": 6, "min_p": 0.1},
    "top-p and min-p": {"top_p": 0.9, "min_p": 0.3},
    "all filters, warm": {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.1},
    "penalties and bias": {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {10: 4.0, 8: -3.0},
        "top_p": 0.9,
    },
}
PROMPT, OUTPUT = [8, 3], [0, 0, 15]


def draw(params: dict[str, object], count: int, by: str, tp: int) -> np.ndarray:
    """Return how often each token was drawn, over ``count`` seeds or positions."""

    def work(comm: Communicator) -> np.ndarray:
        sampler = Sampler(VOCAB, comm, 64)
        mine = shard(LOGITS.repeat(BATCH, 1), comm)
        counts = np.zeros(VOCAB, dtype=np.int64)
        for start in range(0, count, BATCH):
            numbers = range(start, start + BATCH)
            rows = [
                RowSampling(
                    SamplingParams(**{**params, "seed": n if by == "seed" else 11}), PROMPT, OUTPUT, [], 0
                )
                for n in numbers
            ]
            positions = [n if by == "position" else 5 for n in numbers]
            counts += np.bincount(sampler.sample(mine, rows, positions).token_ids, minlength=VOCAB)
        return counts

    return on_all_ranks(Topology(tp=tp), work)[0]


def check(name: str, count: int, by: str, tp: int = 1) -> None:
    params = SamplingParams(**{**CASES[name], "seed": 0})
    exact = twin.filtered_probabilities(
        twin.adjusted(LOGITS.numpy(), params, PROMPT, OUTPUT, [], False), params
    )
    counts = draw(CASES[name], count, by, tp)
    assert counts[exact == 0].sum() == 0
    # Cells that expect few are put together: the approximation wants at least five a cell.
    expected = exact * count
    is_small = expected < 8
    cells = [*zip(counts[~is_small], expected[~is_small], strict=True)]
    if expected[is_small].sum() > 5:
        cells.append((counts[is_small].sum(), expected[is_small].sum()))
    freedom = len(cells) - 1
    chi = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
    assert abs(chi - freedom) < SIGMAS * np.sqrt(2 * freedom), (chi, freedom)


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name: str) -> None:
    check(name, 2_000, "seed")


@pytest.mark.parametrize("name", ["plain", "top-p and min-p"])
def test_draws_over_positions_and_ranks(name: str) -> None:
    check(name, 1_500, "position", tp=3)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("by", ["seed", "position"])
@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution_long(name: str, by: str) -> None:
    check(name, 60_000, by)


def test_the_test_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of a fifth of a logit is seen."""
    exact = twin.filtered_probabilities(LOGITS.numpy(), SamplingParams())
    monkeypatch.setitem(CASES, "skewed", {})
    shifted = LOGITS.clone()
    shifted[8] += 0.2
    monkeypatch.setattr("tests.golden.test_sampling_distribution.LOGITS", shifted)
    counts = draw({}, 20_000, "seed", 1)
    chi = ((counts - exact * 20_000) ** 2 / (exact * 20_000)).sum()
    assert chi - (VOCAB - 1) > SIGMAS * np.sqrt(2 * (VOCAB - 1))
