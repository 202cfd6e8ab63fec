"""Which rows of a step attend over the cache as a matrix (attention_runs.py), told from host numbers."""

from collections.abc import Sequence

LONG_ROW = 1024
"""Tokens of a step from which on a row is worth a launch: with fewer, many multiprocessors would idle."""


def split_runs(
    rows: range, counts: Sequence[int], first_blocks: Sequence[int | None]
) -> tuple[range, dict[int, int]]:
    """Return what stays on pages of some neighbouring rows, and the first blocks of the others, by row.

    These are the long rows that are runs, at the beginning and at the end: what is between two others stays
    with them, since a step has one plan over pages.
    """
    runs = {
        row: first_block
        for row in rows
        if counts[row] >= LONG_ROW and (first_block := first_blocks[row]) is not None
    }
    begin = next((row for row in rows if row not in runs), rows.stop)
    end = next((row + 1 for row in reversed(rows) if row not in runs), begin)
    return range(begin, end), {row: block for row, block in runs.items() if not begin <= row < end}
