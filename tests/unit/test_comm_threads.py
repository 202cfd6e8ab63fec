"""The communicator of threads: the same work as processes do, errors, and ranks that end."""

import time

import pytest
import torch

from protocol.topology import Topology
from tests.unit.comm_layouts import on_all_ranks
from tests.unit.comm_work import Work
from worker.comm import CollectiveError, Communicator, thread_group

LAYOUTS = [(1, 1), (2, 1), (3, 1), (1, 2), (1, 4), (2, 2), (3, 2)]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_all_operations_under_random_delays(tp: int, pp: int) -> None:
    on_all_ranks(Topology(tp=tp, pp=pp), lambda comm: Work(comm, 5, 10, 0.002).run())


@pytest.mark.parametrize(("tp", "pp", "dcp"), [(2, 1, 2), (4, 1, 2), (6, 2, 3)])
def test_parts_of_a_group_have_collectives_of_their_own(tp: int, pp: int, dcp: int) -> None:
    on_all_ranks(Topology(tp=tp, pp=pp, dcp=dcp), lambda comm: Work(comm, 5, 10, 0.002).run())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("tp", "pp"), [*LAYOUTS, (4, 2), (2, 4)])
def test_all_operations_under_random_delays_long(tp: int, pp: int, seed: int) -> None:
    on_all_ranks(Topology(tp=tp, pp=pp), lambda comm: Work(comm, seed, 80, 0.003).run(), timeout_s=60)


def test_one_rank_alone_gets_its_own_tensors_back() -> None:
    (comm,) = thread_group(Topology())
    x = torch.ones(3, 4)
    comm.all_reduce(x)
    comm.barrier()
    assert comm.all_gather(x).data_ptr() == x.data_ptr()
    assert comm.all_gather(x).shape == (1, 3, 4)
    assert comm.reduce_scatter(x) is x
    assert comm.all_to_all(x, [3]) is x


@pytest.mark.parametrize("operation", ["all_reduce", "barrier", "from_previous_stage", "tokens"])
@pytest.mark.parametrize("is_aborted", [True, False])
def test_a_rank_that_ends_releases_the_others(operation: str, is_aborted: bool) -> None:
    comms = thread_group(Topology(tp=2, pp=2), timeout_s=0.2)
    if is_aborted:
        comms[3].abort()
    waits = {
        "all_reduce": (2, [3], lambda: comms[2].all_reduce(torch.ones(2))),
        "barrier": (0, [1, 2, 3], lambda: comms[0].barrier()),
        "from_previous_stage": (2, [0], lambda: comms[2].from_previous_stage((1,), torch.float32)),
        "tokens": (1, [3], lambda: comms[1].tokens_from_last_stage(1)),
    }
    rank, absent, wait = waits[operation]
    began = time.monotonic()
    with pytest.raises(CollectiveError, match=f"rank {rank}, {operation}") as caught:
        wait()
    assert caught.value.peers == ((3,) if is_aborted else tuple(absent))
    assert (time.monotonic() - began < 0.15) == is_aborted


def test_different_plans_are_an_error_on_both_ranks() -> None:
    def work(comm: Communicator) -> str:
        with pytest.raises(CollectiveError, match="the ranks run different plans") as caught:
            comm.all_reduce(torch.zeros(3 + comm.rank))
        return caught.value.message

    assert "with 16 bytes, not 12" in on_all_ranks(Topology(tp=2), work)[0]


def test_what_cannot_be_dealt_is_refused() -> None:
    def work(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="3 rows cannot be dealt evenly to 2 ranks"):
            comm.reduce_scatter(torch.zeros(3, 1))
        for counts in ([1, 1], [3], [4, -1]):
            with pytest.raises(ValueError, match="do not deal 3 rows to 2 ranks"):
                comm.all_to_all(torch.zeros(3, 1), counts)

    on_all_ranks(Topology(tp=2), work)


def test_a_hidden_state_of_another_shape_is_an_error() -> None:
    comms = thread_group(Topology(pp=2))
    comms[0].to_next_stage(torch.zeros(2, 3))
    with pytest.raises(CollectiveError, match="rank 1, from_previous_stage with rank 0"):
        comms[1].from_previous_stage((2, 4), torch.float32)
