"""When ranks tell how often their experts were chosen, and what comes of it."""

from collections.abc import Callable

import pytest

from orchestrator.expert_totals import ExpertTotals
from protocol.client import ExpertBalance
from protocol.control import ExpertLoad, LayerLoad, from_worker_codec
from protocol.topology import Topology
from worker.expert_load import INTERVAL_S, CountedLayer, LoadReports


class Rank:
    """Counts of two layers with two experts each, and a clock."""

    def __init__(self, topology: Topology, rank: int) -> None:
        self.counts = [[5, 5], [0, 7]]
        self.now_s = 100.0
        self.num_read = 0
        layers = [CountedLayer(3, 2 * rank, self.reads(0)), CountedLayer(4, 2 * rank, self.reads(1))]
        self.reports = LoadReports(layers, topology, rank, 1, lambda: self.now_s)

    def reads(self, index: int) -> Callable[[], list[int]]:
        def read() -> list[int]:
            self.num_read += 1
            return list(self.counts[index])

        return read


def test_a_rank_tells_its_counts_some_seconds_after_a_step_and_then_no_more() -> None:
    rank = Rank(Topology(2, ep=2), 1)
    assert rank.reports.wait_s() is None
    assert rank.reports.take() is None
    rank.counts = [[6, 5], [0, 9]]
    rank.reports.stepped()
    rank.now_s += 1
    rank.reports.stepped()
    assert rank.reports.wait_s() == pytest.approx(INTERVAL_S - 1)
    assert rank.reports.take() is None
    rank.now_s += INTERVAL_S - 1
    # The warm-up's are left out.
    load = ExpertLoad(1, 1, [LayerLoad(3, 2, [1, 0]), LayerLoad(4, 2, [0, 2])])
    assert rank.reports.take() == load
    assert rank.reports.take() is None
    assert rank.reports.wait_s() is None
    codec = from_worker_codec()
    assert codec.decode(codec.encode(load)) == load


@pytest.mark.parametrize(("topology", "rank"), [(Topology(2), 1), (Topology(2, 2), 3)])
def test_ranks_that_count_what_another_counts_say_nothing(topology: Topology, rank: int) -> None:
    silent = Rank(topology, rank)
    silent.reports.stepped()
    silent.now_s += 2 * INTERVAL_S
    assert silent.reports.take() is None
    assert silent.reports.wait_s() is None
    assert silent.num_read == 0


def test_a_model_without_experts_costs_nothing() -> None:
    reports = LoadReports([], Topology(), 0, 1)
    reports.stepped()
    assert reports.wait_s() is None
    assert reports.take() is None


def test_counts_of_all_ranks_are_one_balance() -> None:
    totals = ExpertTotals()
    assert totals.balance() == []
    totals.take(ExpertLoad(1, 0, [LayerLoad(3, 0, [9, 9]), LayerLoad(4, 0, [0, 0])]))
    totals.take(ExpertLoad(1, 1, [LayerLoad(3, 2, [2, 0])]))
    totals.take(ExpertLoad(1, 0, [LayerLoad(3, 0, [4, 2])]))
    assert totals.balance() == [ExpertBalance(3, 8, 2.0, 0), ExpertBalance(4, 0, 1.0, 0)]
