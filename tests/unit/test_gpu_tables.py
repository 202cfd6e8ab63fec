"""What is decided for a GPU without one: sizes of graphs, and which kernel serves which step."""

import pytest

from worker.backends.cuda.attention_paths import DECODE_PATHS
from worker.backends.cuda.graphs import LADDER, SHORT_LADDER, ladder
from worker.backends.cuda.linear_table import CUBLAS, GATED, GEMV_ROWS, MEASURED, PLAIN, choose


@pytest.mark.parametrize("rungs", [LADDER, SHORT_LADDER])
@pytest.mark.parametrize("max_rows", [1, 2, 7, 64, 200, 256, 257, 1000])
def test_every_number_of_rows_has_a_graph_and_few_are_padded_much(
    max_rows: int, rungs: tuple[int, ...]
) -> None:
    sizes = ladder(max_rows, rungs)
    assert sizes[-1] == max_rows
    assert list(sizes) == sorted(set(sizes))
    if rungs is LADDER:
        for rows in range(1, max_rows + 1):
            size = next(size for size in sizes if size >= rows)
            assert size <= max(rows + 3, 1.34 * rows)


@pytest.mark.parametrize("rows", range(1, 300))
def test_some_rule_attends_at_any_context(rows: int) -> None:
    for context in (1.0, 383.5, 1023.0, 1024.0, 1e6):
        assert any(rule.serves(rows, context) for rule in DECODE_PATHS if rule.path.startswith("ring"))
        assert any(rule.serves(rows, context) for rule in DECODE_PATHS if rule.path == "vector")


def test_products_name_kernels_that_there_are() -> None:
    plain = {name for names in PLAIN.values() for name in names}
    gated = {name for names in GATED.values() for name in names}
    for (is_gated, rows, _, _), choice in MEASURED.items():
        assert rows <= GEMV_ROWS
        assert choice.kernel in {CUBLAS} | (gated if is_gated else plain)
    for rows in (1, 8, 9, 16, 17, 32):
        for outputs in (8, 100, 4096, 300_000):
            assert choose(rows, outputs, 512).kernel in plain
            assert choose(rows, outputs, 512, gated=True).kernel in gated
    assert choose(GEMV_ROWS + 1, 4096, 4096).kernel == CUBLAS
