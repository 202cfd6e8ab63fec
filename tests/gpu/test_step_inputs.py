"""A step's tensors made on the device against the same made in Python."""

import numpy as np
import pytest
import torch

from tests.gpu.poison import load_kernels, poison_new_tensors

pytestmark = pytest.mark.gpu

GROUPS, MAX_ROWS, MAX_BLOCKS, MAX_TOKENS, BLOCK_TOKENS = 2, 300, 40, 2000, 16


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return load_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def inputs(kernels, monkeypatch):
    from worker.backends.cuda.step_inputs import StepInputs

    made = StepInputs(
        kernels,
        torch.device("cuda"),
        groups=GROUPS,
        max_rows=MAX_ROWS,
        max_blocks=MAX_BLOCKS,
        max_tokens=MAX_TOKENS,
        block_tokens=BLOCK_TOKENS,
    )
    poison_new_tensors(monkeypatch)
    made.last_tokens.copy_(torch.randint(0, 1000, (MAX_ROWS + 1,)))
    return made


def fill_tables(inputs, random: np.random.Generator) -> np.ndarray:
    """Give every place a block in several calls; return the tables that must come of it."""
    tables = np.zeros((GROUPS, MAX_ROWS + 1, MAX_BLOCKS), dtype=np.int32)
    for count in (GROUPS * MAX_ROWS * MAX_BLOCKS, 1, 300, 0):
        places = random.permutation(GROUPS * MAX_ROWS * MAX_BLOCKS)[:count]
        group, slot, index = np.unravel_index(places, (GROUPS, MAX_ROWS, MAX_BLOCKS))
        blocks = random.integers(0, 1 << 24, count)
        inputs.change_tables(np.stack((group, slot, index, blocks), axis=1).astype(np.int32))
        tables[group, slot, index] = blocks
    return tables


def line(tables: np.ndarray, group: int, slot: int, position: int) -> int:
    if slot == MAX_ROWS:
        return -1
    return int(tables[group, slot, position // BLOCK_TOKENS]) * BLOCK_TOKENS + position % BLOCK_TOKENS


def test_tables_change_as_told(inputs) -> None:
    tables = fill_tables(inputs, np.random.default_rng(1))
    assert np.array_equal(inputs.block_tables.cpu().numpy(), tables)


@pytest.mark.parametrize("rows", [1, 7, 257])
def test_decode_in_a_graph(inputs, rows: int) -> None:
    random = np.random.default_rng(rows)
    tables = fill_tables(inputs, random)
    last = inputs.last_tokens.cpu().numpy()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        inputs.send_decode(np.full(rows, MAX_ROWS, np.int32), np.zeros(rows, np.int32))
        inputs.decode(rows)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            step = inputs.decode(rows)
        for _ in range(9):
            slots = random.permutation(MAX_ROWS)[:rows].astype(np.int32)
            starts = random.integers(0, MAX_BLOCKS * BLOCK_TOKENS, rows).astype(np.int32)
            slots[rows // 2 + 1 :: 3], starts[rows // 2 + 1 :: 3] = MAX_ROWS, 0
            inputs.send_decode(slots, starts)
            graph.replay()
            assert np.array_equal(step.slots.cpu(), slots)
            assert np.array_equal(step.q_starts.cpu(), np.arange(rows + 1))
            assert np.array_equal(step.positions.cpu(), starts)
            assert np.array_equal(step.kv_lengths.cpu(), starts + 1)
            assert np.array_equal(step.token_ids.cpu(), last[slots])
            assert np.array_equal(step.logit_tokens.cpu(), np.arange(rows))
            assert np.array_equal(step.logit_slots.cpu(), slots)
            assert np.array_equal(step.logit_lengths.cpu(), starts + 1)
            for group in range(GROUPS):
                want = [line(tables, group, s, p) for s, p in zip(slots, starts, strict=True)]
                assert step.lines[group].tolist() == want


@pytest.mark.parametrize("rows", [1, 5, 260])
def test_mixed(inputs, rows: int) -> None:
    random = np.random.default_rng(rows)
    tables = fill_tables(inputs, random)
    last = inputs.last_tokens.cpu().numpy()
    for _ in range(6):
        slots = random.permutation(MAX_ROWS)[:rows].astype(np.int32)
        slots[rows // 2 + 1 :: 7] = MAX_ROWS
        counts = random.integers(1, 8, rows).astype(np.int32)
        counts[0] += 500
        if counts.sum() > MAX_TOKENS:
            counts[:] = 1
        starts = random.integers(0, MAX_BLOCKS * BLOCK_TOKENS - 510, rows).astype(np.int32)
        offsets = np.concatenate(([0], np.cumsum(counts)))
        token_ids = random.integers(-1, 50, counts.sum()).astype(np.int32)
        wanting = np.flatnonzero(random.integers(0, 2, rows))
        step = inputs.mixed(slots, starts, counts, token_ids, (offsets[wanting + 1] - 1).astype(np.int32))
        assert np.array_equal(step.slots.cpu(), slots)
        assert np.array_equal(step.q_starts.cpu(), offsets)
        assert np.array_equal(step.kv_lengths.cpu(), starts + counts)
        assert np.array_equal(step.logit_tokens.cpu(), offsets[wanting + 1] - 1)
        assert np.array_equal(step.logit_slots.cpu(), slots[wanting])
        assert np.array_equal(step.logit_lengths.cpu(), (starts + counts)[wanting])
        row = np.repeat(np.arange(rows), counts)
        positions = starts[row] + np.arange(len(row)) - offsets[row]
        assert np.array_equal(step.positions.cpu(), positions)
        assert np.array_equal(step.token_ids.cpu(), np.where(token_ids < 0, last[slots[row]], token_ids))
        for group in range(GROUPS):
            want = [line(tables, group, s, p) for s, p in zip(slots[row], positions, strict=True)]
            assert step.lines[group].tolist() == want
