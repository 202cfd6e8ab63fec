"""Which rows of a step attend over the cache as a matrix, and which stay on pages."""

import random

from worker.backends.cuda.long_rows import LONG_ROW, split_runs

LONG, SHORT = LONG_ROW, LONG_ROW - 1


def test_long_runs_at_both_ends_are_alone_and_what_is_between_stays_together() -> None:
    counts = [1, LONG, LONG, SHORT, LONG, LONG, LONG, 1]
    blocks = [0, 10, 20, 30, 40, None, 60, 70]
    assert split_runs(range(1, 7), counts, blocks) == (range(3, 6), {1: 10, 2: 20, 6: 60})
    assert split_runs(range(1, 3), counts, blocks) == (range(3, 3), {1: 10, 2: 20})
    assert split_runs(range(3, 4), counts, blocks) == (range(3, 4), {})
    assert split_runs(range(2, 2), counts, blocks) == (range(2, 2), {})


def test_every_row_is_in_one_place() -> None:
    draw = random.Random(0)
    for _ in range(500):
        total = draw.randrange(12)
        counts = [draw.choice((2, SHORT, LONG, 5000)) for _ in range(total)]
        blocks = [draw.choice((None, 0, 7)) for _ in range(total)]
        begin = draw.randrange(total + 1)
        rows = range(begin, draw.randrange(begin, total + 1))
        paged, runs = split_runs(rows, counts, blocks)
        assert sorted([*paged, *runs]) == list(rows)
        assert all(counts[row] >= LONG and blocks[row] == block for row, block in runs.items())
        if paged:
            ends = paged[0], paged[-1]
            assert all(counts[row] < LONG or blocks[row] is None for row in ends)
