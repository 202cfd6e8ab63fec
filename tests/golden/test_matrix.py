"""Every model over every layout: log-probabilities at every position, against transformers in float32.

Prompts whole, then in steps of 7 tokens with as many steps in flight as the stages take; then decode.
Blocks are scattered. Placed experts run in both forms, each layout in one of them.
"""

from pathlib import Path

import pytest

from models.layout import check_degrees
from models.registry import load_spec
from protocol.errors import LayoutError
from protocol.topology import Topology
from tests.conftest import commit
from tests.golden import matrix
from tests.golden.scored import check_answers
from tests.golden.tiny import force_split


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        draw = metafunc.config.getoption("matrix") or commit()
        metafunc.parametrize("cell", matrix.chosen(draw), ids=str)


def test_the_layout_answers_as_transformers(
    root: Path, cell: matrix.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cell.topology.ep > 1:
        force_split(monkeypatch, is_split=(cell.topology.pp + cell.topology.dcp) % 2 == 0)
    directory, answers = matrix.reference(root, cell.model)
    new_tokens = matrix.MODELS[cell.model].new_tokens
    check_answers(directory, answers, cell.topology, new_tokens, num_blocks=512)


@pytest.mark.parametrize("name", matrix.MODELS)
def test_the_matrix_has_every_layout_that_is_possible(root: Path, name: str) -> None:
    spec = load_spec(matrix.reference(root, name)[0])
    for tp in matrix.DEGREES:
        for pp in matrix.STAGES:
            for ep in {1, tp}:
                for dcp in (d for d in matrix.DEGREES if tp % d == 0):
                    topology = Topology(tp, pp, ep, dcp)
                    is_cell = topology in set(matrix.possible(matrix.MODELS[name]))
                    try:
                        check_degrees(spec, topology)
                    except LayoutError:
                        assert not is_cell, topology
                    else:
                        assert is_cell, topology


def test_a_draw_takes_about_a_third_and_draws_differ() -> None:
    cells, some, others = matrix.cells(), matrix.chosen("one"), matrix.chosen("another")
    assert len(set(cells)) == len(cells) > 200
    for drawn in (some, others):
        assert 0.25 < len(drawn) / len(cells) < 0.42
        assert {cell.model for cell in drawn} == set(matrix.MODELS)
    assert set(some) != set(others)
    assert matrix.chosen("one") == some
    assert matrix.chosen(matrix.ALL) == cells
