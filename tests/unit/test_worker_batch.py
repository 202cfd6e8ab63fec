"""Row state under plans: the way of a right one, and a named error for each wrong one."""

from collections.abc import Callable

import msgspec
import pytest

from protocol.control import Advance, NewRow, StepPlan
from protocol.errors import ProtocolError
from protocol.sampling import SamplingParams
from worker.batch import Batch, BatchLimits, Row

LIMITS = BatchLimits(
    max_rows=3, step_tokens=16, context=20, vocab_size=100, num_groups=2, num_blocks=10, block_tokens=4
)


def new_row(slot: int = 0, known: int = 6, computed: int = 0, **changes: object) -> NewRow:
    row = NewRow(
        slot=slot,
        token_ids=list(range(1, known + 1)),
        num_prompt_tokens=known,
        num_computed_tokens=computed,
        block_ids=([0 + slot * 3, 1 + slot * 3], [2 + slot * 3, 0 + slot * 3]),
        sampling=SamplingParams(seed=1),
        banned_token_ids=[],
        banned_until=0,
    )
    return msgspec.structs.replace(row, **changes)


def plan(
    step: int,
    advances: list[Advance],
    new_rows: list[NewRow] | None = None,
    released: list[int] | None = None,
) -> StepPlan:
    return StepPlan(1, step, released or [], new_rows or [], advances)


def batch() -> tuple[Batch, list[Row]]:
    seen: list[Row] = []
    return Batch(LIMITS, seen.append), seen


def test_a_row_moves_by_differences_until_it_is_released() -> None:
    rows, seen = batch()
    (first,) = rows.apply(plan(5, [Advance(0, 4, None, False)], [new_row()]))
    assert (first.span.offset, first.span.start, first.span.count, first.wants_logits) == (0, 0, 4, False)
    assert [table.ids for table in first.span.tables] == [[0, 1], [2, 0]]
    assert [table.is_run for table in first.span.tables] == [True, False]
    assert [row.slot for row in seen] == [0]
    (second,) = rows.apply(plan(6, [Advance(0, 2, None, True)]))
    assert (second.span.start, second.span.end, second.row.num_known) == (4, 6, 7)
    for step in (7, 8):
        rows.apply(plan(step, [Advance(0, 1, None, True)]))
    (third,) = rows.apply(plan(9, [Advance(0, 1, ([7], [8]), True)]))
    assert [table.ids for table in third.span.tables] == [[0, 1, 7], [2, 0, 8]]
    assert (third.span.start, third.row.num_known) == (8, 10)
    assert rows.apply(plan(10, [], released=[0])) == []
    assert len(rows) == 0


def test_a_slot_is_taken_again_in_the_step_that_releases_it() -> None:
    rows, seen = batch()
    rows.apply(plan(0, [Advance(0, 6, None, True)], [new_row()]))
    (again,) = rows.apply(plan(1, [Advance(0, 1, None, True)], [new_row(known=3, computed=2)], [0]))
    assert again.row is seen[1]
    assert (again.span.start, again.row.token_ids) == (2, [1, 2, 3])


def test_rows_stand_in_the_order_of_the_plan() -> None:
    rows, _ = batch()
    found = rows.apply(
        plan(
            0,
            [Advance(2, 3, None, False), Advance(0, 6, None, True), Advance(1, 1, None, False)],
            [new_row(0), new_row(1), new_row(2)],
        )
    )
    assert [(item.row.slot, item.span.offset) for item in found] == [(2, 0), (0, 3), (1, 9)]


def _one(advance: Advance, row: NewRow | None = None) -> Callable[[Batch], object]:
    return lambda b: b.apply(plan(0, [advance], [row or new_row()]))


def _after_first(wrong: StepPlan) -> Callable[[Batch], object]:
    def act(b: Batch) -> object:
        b.apply(plan(0, [Advance(0, 6, None, True)], [new_row()]))
        return b.apply(wrong)

    return act


RIGHT = Advance(0, 6, None, True)

WRONG: dict[str, tuple[Callable[[Batch], object], str]] = {
    "slot out of range": (_one(RIGHT, new_row(slot=3)), "slot 3 is not one of 3"),
    "negative slot": (_one(RIGHT, new_row(slot=-1)), "slot -1 is not one of 3"),
    "slot taken": (_after_first(plan(1, [], [new_row()])), "slot 0 holds a row already"),
    "release of nothing": (_after_first(plan(1, [], [], [2])), "slot 2 is released and holds no row"),
    "advance of nothing": (_after_first(plan(1, [Advance(1, 1, None, True)])), "slot 1 advances and holds"),
    "no tokens": (_one(RIGHT, new_row(known=0)), "has 0 tokens"),
    "too many tokens": (_one(RIGHT, new_row(known=21)), "has 21 tokens, a row has 1 to 20"),
    "all computed": (_one(RIGHT, new_row(known=6, computed=6)), "has 6 tokens computed"),
    "negative computed": (_one(RIGHT, new_row(known=6, computed=-1)), "has -1 tokens computed"),
    "prompt over known": (_one(RIGHT, new_row(num_prompt_tokens=7)), "7 of the prompt"),
    "token outside": (_one(RIGHT, new_row(known=2, token_ids=[1, 100])), "token outside the vocabulary"),
    "negative token": (_one(RIGHT, new_row(known=1, token_ids=[-1])), "token outside the vocabulary"),
    "groups missing": (_one(RIGHT, new_row(block_ids=([0, 1],))), "1 KV groups of 2"),
    "block outside": (_one(RIGHT, new_row(block_ids=([0, 10], [1, 2]))), "block that is not one of 10"),
    "negative block": (_one(RIGHT, new_row(block_ids=([0, 1], [1, -1]))), "block that is not one of 10"),
    "new block outside": (_one(Advance(0, 6, ([], [11]), True)), "block that is not one of 10"),
    "no advance": (_one(Advance(0, 0, None, False)), "advances by 0"),
    "past the known": (_one(Advance(0, 7, None, False)), "advances by 7 from 0 of 6"),
    "token too early": (_one(Advance(0, 5, None, True)), "wants a token after position 5"),
    "blocks too few": (_one(RIGHT, new_row(block_ids=([0], [1, 2]))), "its blocks hold 4 tokens"),
    "too many at once": (
        lambda b: b.apply(
            plan(0, [Advance(s, 6, None, True) for s in range(3)], [new_row(s) for s in range(3)])
        ),
        "18 tokens are over the limit of 16",
    ),
    "slot twice": (
        lambda b: b.apply(plan(0, [Advance(0, 1, None, False)] * 2, [new_row()])),
        "a slot stands in the step twice",
    ),
    "block written twice": (
        lambda b: b.apply(
            plan(
                0,
                [Advance(0, 6, None, True), Advance(1, 6, None, True)],
                [new_row(0), new_row(1, block_ids=([4, 1], [5, 6]))],
            )
        ),
        "slot 1 writes a block that is written twice",
    ),
    "step lost": (_after_first(plan(2, [])), "step 2 came after step 0"),
    "step again": (_after_first(plan(0, [])), "step 0 came after step 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_is_refused_by_name(name: str) -> None:
    act, message = WRONG[name]
    rows, _ = batch()
    with pytest.raises(ProtocolError, match="step ") as caught:
        act(rows)
    assert message in caught.value.message


def test_the_context_is_a_bound_of_its_own() -> None:
    rows = Batch(BatchLimits(1, 16, 5, 100, 1, 10, 4), lambda row: None)
    rows.apply(plan(0, [Advance(0, 5, None, True)], [new_row(known=5, block_ids=([0, 1],))]))
    with pytest.raises(ProtocolError, match="the context 5"):
        rows.apply(plan(1, [Advance(0, 1, None, True)]))


def test_shared_prefix_blocks_may_be_read_by_many() -> None:
    rows, _ = batch()
    shared = [
        new_row(0, 6, computed=4, block_ids=([0, 1], [0, 1])),
        new_row(1, 6, computed=4, block_ids=([0, 2], [0, 2])),
    ]
    found = rows.apply(plan(0, [Advance(0, 2, None, True), Advance(1, 2, None, True)], shared))
    assert [item.span.start for item in found] == [4, 4]
