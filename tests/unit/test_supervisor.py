"""Which of several faults that come together the supervisor takes for the cause."""

import asyncio
from itertools import permutations

import pytest

from orchestrator.config import Deadlines
from orchestrator.supervisor import Supervisor
from protocol.control import Fault, FaultKind
from protocol.errors import COLLECTIVE_CODE

WITNESSES = [Fault(1, rank, FaultKind.STEP, "it has ended", COLLECTIVE_CODE) for rank in (1, 2)]
CAUSE = Fault(1, 0, FaultKind.STEP, "StepError: the ninth bit is set")


async def verdict(faults: list[Fault]) -> Fault:
    told: asyncio.Future[Fault] = asyncio.get_running_loop().create_future()
    supervisor = Supervisor([], 1, Deadlines(), on_lost=told.set_result, on_output=lambda ranks, line: None)
    for fault in faults:
        supervisor.report(fault)
    found = await asyncio.wait_for(told, 5.0)
    supervisor._look.cancel()
    return found


@pytest.mark.parametrize("faults", list(permutations([*WITNESSES, CAUSE])))
def test_a_rank_that_lost_its_peer_is_not_the_cause(faults: tuple[Fault, ...]) -> None:
    assert asyncio.run(verdict(list(faults))) == CAUSE


def test_it_is_where_nobody_says_more() -> None:
    assert asyncio.run(verdict(WITNESSES)) == WITNESSES[0]
