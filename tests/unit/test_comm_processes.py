"""The communicator of real processes: right, on loopback alone, and never waiting without end."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., list[dict[str, Any]]]
LAYOUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2), (3, 2)]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Return what runs a scenario and gives its ranks' answers."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tests.unit.comm_zygote as z; z.main()"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as zygote:
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        stdin, stdout = zygote.stdin, zygote.stdout

        def ask(scenario: str, tp: int, pp: int = 1, timeout_s: float = 20.0, **job: Any) -> list[Any]:
            job |= {"scenario": scenario, "tp": tp, "pp": pp, "timeout_s": timeout_s}
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
            answers: list[Any] = json.loads(stdout.readline())
            return answers

        yield ask
        stdin.close()
        assert zygote.wait(10) == 0


def check_all_operations(run: Run, tp: int, pp: int, seed: int, turns: int, dcp: int = 1) -> None:
    answers = run("all_operations", tp, pp, seed=seed, turns=turns, pause_s=0.003, dcp=dcp)
    # 0100007F is 127.0.0.1; without a pipeline there is nothing to listen for.
    expected = ["0100007F"] if pp > 1 else []
    assert [a.get("result", a) for a in answers] == [expected] * (tp * pp)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_all_operations(run: Run, tp: int, pp: int) -> None:
    check_all_operations(run, tp, pp, seed=1, turns=8)


@pytest.mark.parametrize(("tp", "pp", "dcp"), [(4, 1, 2), (2, 2, 2)])
def test_all_operations_of_parts_of_a_group(run: Run, tp: int, pp: int, dcp: int) -> None:
    check_all_operations(run, tp, pp, seed=1, turns=8, dcp=dcp)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("tp", "pp"), [*LAYOUTS, (8, 1), (2, 4)])
def test_all_operations_long(run: Run, tp: int, pp: int, seed: int) -> None:
    check_all_operations(run, tp, pp, seed=seed, turns=60)


WAITS = [
    (3, 1, "all_reduce", 1, [0, 2]),
    (1, 2, "from_previous_stage", 0, [1]),
    (2, 2, "barrier", 3, [0, 1, 2]),
    (1, 2, "tokens_from_last_stage", 1, [0]),
    (1, 2, "to_next_stage", 1, [0]),
]
"""tp, pp, operation, the rank that leaves, and the ranks that wait for it."""


@pytest.mark.parametrize(("tp", "pp", "operation", "victim", "waiting"), WAITS)
def test_a_peer_that_dies_ends_every_wait(
    run: Run, tp: int, pp: int, operation: str, victim: int, waiting: list[int]
) -> None:
    answers = run("one_leaves", tp, pp, 30.0, operation=operation, victim=victim, how="kill")
    # A death is seen at once; the slack is for other programs on these cores.
    check_ended(answers, operation, victim, waiting, 8.0)


def check_stays_away(run: Run, tp: int, pp: int, operation: str, victim: int, waiting: list[int]) -> None:
    job = {"operation": operation, "victim": victim, "how": "stay away"}
    check_ended(run("one_leaves", tp, pp, 0.7, **job), operation, victim, waiting, 5.0)


@pytest.mark.parametrize(("tp", "pp", "operation", "victim", "waiting"), WAITS[:2])
def test_a_peer_that_stays_away_ends_every_wait(
    run: Run, tp: int, pp: int, operation: str, victim: int, waiting: list[int]
) -> None:
    check_stays_away(run, tp, pp, operation, victim, waiting)


@pytest.mark.long
@pytest.mark.parametrize(("tp", "pp", "operation", "victim", "waiting"), WAITS)
def test_a_peer_that_stays_away_ends_every_wait_long(
    run: Run, tp: int, pp: int, operation: str, victim: int, waiting: list[int]
) -> None:
    check_stays_away(run, tp, pp, operation, victim, waiting)


def check_ended(
    answers: list[dict[str, Any]], operation: str, victim: int, waiting: list[int], limit_s: float
) -> None:
    by_rank = {answer["rank"]: answer for answer in answers}
    for rank in waiting:
        answer = by_rank[rank]
        assert answer.get("operation") == operation, answer
        assert f"rank {rank}, {operation} with rank" in answer["error"]
        assert answer["seconds"] < limit_s
        assert rank not in answer["peers"]
    assert victim in {peer for rank in waiting for peer in by_rank[rank]["peers"]}


def check_never_comes(run: Run, tp: int, pp: int) -> None:
    answers = run("all_operations", tp, pp, 0.5, absent=[0], seed=0, turns=1, pause_s=0.0)
    for answer in answers[1:]:
        assert answer.get("operation") is not None, answer
        assert answer["seconds"] < 5.0


def test_a_rank_that_never_comes_ends_the_others_meeting(run: Run) -> None:
    check_never_comes(run, 2, 2)


@pytest.mark.long
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (3, 1), (1, 3)])
def test_a_rank_that_never_comes_ends_the_others_meeting_long(run: Run, tp: int, pp: int) -> None:
    check_never_comes(run, tp, pp)


def test_ranks_that_run_different_plans_are_told_so(run: Run) -> None:
    answers = run("different_plans", 2, victim=1)
    assert [answer["peers"] for answer in answers] == [[1], [0]]
    assert "with 32 bytes, not for number 1 with 36: the ranks run different plans" in answers[0]["error"]


def test_a_directory_too_deep_for_a_socket_will_do(run: Run) -> None:
    answers = run("all_operations", 2, folders=["d" * 100, "e" * 100], seed=3, turns=1, pause_s=0.0)
    assert [answer.get("result", answer) for answer in answers] == [[], []]
