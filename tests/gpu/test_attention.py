"""Every attention path against float64, over scattered blocks, with NaN wherever nothing may be read."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from kv.tensors import LayerCache
from worker.backends.cpu_float8 import store_rounded
from worker.backends.cuda.attention_paths import RingPath

pytestmark = pytest.mark.gpu

FORGIVEN = {torch.bfloat16: 1.5e-2, torch.float32: 2e-5}


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int = 0
    block_tokens: int = 64
    is_float8: bool = False

    @property
    def values(self) -> int:
        return self.value_dim or self.key_dim

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        kv = "-float8" if self.is_float8 else ""
        return f"{name}-{self.heads}-{self.kv_heads}-{self.key_dim}-{self.values}-{self.block_tokens}{kv}"


BF16, F32 = torch.bfloat16, torch.float32
OWN = [
    Case(BF16, 32, 8, 128),
    Case(BF16, 64, 8, 128, block_tokens=16),
    Case(BF16, 40, 8, 128),
    Case(BF16, 9, 3, 64, block_tokens=16),
    Case(BF16, 4, 2, 80),
    Case(BF16, 6, 1, 96),
    Case(BF16, 22, 1, 128),
    Case(BF16, 4, 2, 256),
    Case(BF16, 4, 4, 16, 24),
    Case(BF16, 4, 2, 48, 72, 32),
    Case(F32, 9, 3, 64, block_tokens=16),
    Case(F32, 4, 4, 16, 24),
    Case(F32, 10, 2, 128),
    Case(F32, 4, 1, 256),
    Case(F32, 4, 2, 40, 8, 6),
    Case(BF16, 32, 8, 128, is_float8=True),
    Case(BF16, 64, 8, 128, block_tokens=16, is_float8=True),
    Case(BF16, 22, 1, 128, block_tokens=32, is_float8=True),
    Case(BF16, 9, 3, 64, block_tokens=16, is_float8=True),
    Case(BF16, 4, 2, 48, 72, 24, is_float8=True),
    Case(F32, 10, 2, 128, is_float8=True),
    Case(F32, 4, 1, 256, 8, 8, is_float8=True),
]
FLASHINFER_DECODE = [
    Case(BF16, 32, 8, 128),
    Case(BF16, 4, 1, 128),
    Case(BF16, 40, 8, 128),
    Case(BF16, 64, 8, 128),
    Case(BF16, 8, 1, 128),
    Case(BF16, 64, 8, 128, block_tokens=16),
]
FLASHINFER_PREFILL = [
    (Case(BF16, 32, 8, 128), "fa3"),
    (Case(BF16, 8, 1, 128, block_tokens=16), "fa3"),
    (Case(BF16, 10, 2, 128), "fa3"),
    (Case(BF16, 32, 8, 128), "fa2"),
    (Case(BF16, 9, 3, 64, block_tokens=16), "fa2"),
    (Case(BF16, 32, 8, 64), "fa2"),
    (Case(BF16, 32, 8, 128, is_float8=True), "fa3"),
    (Case(BF16, 8, 1, 128, block_tokens=16, is_float8=True), "fa3"),
    (Case(BF16, 32, 8, 128, is_float8=True), "fa2"),
]
RINGS: tuple[str, ...] = get_args(RingPath)
DECODE_LENGTHS = [
    [1],
    [129],
    [4099],
    [1, 15, 16, 17, 63, 64, 65, 127, 700, 2049, 513],
    [5 + 37 * i % 400 for i in range(67)],
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels, and the directory of operators or None: ``TEST_OPERATORS``, or the user's own."""
    pytest.importorskip("cuda.bindings")
    from worker.backends.cuda.compiler import KernelCache
    from worker.backends.cuda.device import architecture, operators_directory
    from worker.backends.cuda.launch import Kernels

    torch.cuda.set_device(0)
    torch.zeros(1, device="cuda")
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem" / "kernels"
    found = Path(os.environ.get("TEST_OPERATORS") or operators_directory(cached, architecture(0)))
    cache = KernelCache(tmp_path_factory.mktemp("kernels"), architecture(0))
    return Kernels(cache), found if found.is_dir() else None


class World:
    """A cache full of NaN but for the rows' tokens, and the device's tables of where these are."""

    def __init__(
        self,
        case: Case,
        lengths: list[int],
        seed: int,
        spare_rows: int = 3,
        runs: frozenset[int] = frozenset(),
    ) -> None:
        """``runs``: rows whose blocks are neighbours in ascending order."""
        generator = torch.Generator("cuda").manual_seed(seed)
        self.case, self.lengths = case, lengths
        block = case.block_tokens
        self.max_rows = len(lengths) + spare_rows
        self.max_blocks = max(-(-length // block) for length in lengths) + 5
        total = sum(-(-length // block) for length in lengths)
        # Runs come first, each before a block that nobody has.
        for_runs = sum(-(-lengths[row] // block) + 1 for row in runs)
        self.num_blocks, first_of_run = total + len(runs) + 7, 0
        order = torch.randperm(self.num_blocks, generator=generator, device="cuda").tolist()
        order = [at for at in order if at >= for_runs]
        # Lines of other rows, and entries beyond a row's length, point outside of the cache.
        tables = torch.full((self.max_rows + 1, self.max_blocks), 1 << 30, dtype=torch.int32)
        slots = torch.randperm(self.max_rows, generator=generator, device="cuda").tolist()[: len(lengths)]
        self.blocks = []
        for slot, length in zip(slots, lengths, strict=True):
            count = -(-length // block)
            if len(self.blocks) in runs:
                mine = list(range(first_of_run, first_of_run + count))
                first_of_run += count + 1
            else:
                mine, order = order[:count], order[count:]
            tables[slot, :count] = torch.tensor(mine, dtype=torch.int32)
            self.blocks.append(mine)
        tables[self.max_rows] = order[0]
        self.tables = tables.cuda()
        self.slots = torch.tensor(slots, dtype=torch.int32, device="cuda")
        self.kv_lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        width = case.kv_heads * (case.key_dim + case.values)
        lines = torch.full((self.num_blocks * block, width), math.nan, dtype=case.dtype, device="cuda")
        self.cache = self.plain = LayerCache(0, lines, case.kv_heads, case.key_dim, case.values)
        """What the cache holds, element by element."""
        if case.is_float8:
            # Codes that are no numbers, under scales that are infinite.
            size = (self.num_blocks, block * case.kv_heads * (case.key_dim + case.values + 2))
            pages = torch.full(size, 0xFF, dtype=torch.uint8, device="cuda")
            self.cache = LayerCache(0, pages, case.kv_heads, case.key_dim, case.values)
        self.lines = []
        for mine, length in zip(self.blocks, lengths, strict=True):
            where = torch.tensor(mine, device="cuda").repeat_interleave(block) * block
            where = (where + torch.arange(block, device="cuda").repeat(len(mine)))[:length]
            fresh = torch.randn((length, width), generator=generator, device="cuda")
            if case.is_float8:
                fresh *= torch.exp2(torch.randint(-9, 2, (length, 1), generator=generator, device="cuda"))
                store_rounded(fresh, self.cache, where)
            lines[where] = fresh.to(case.dtype)
            self.lines.append(where)
        self.generator = generator

    def queries(self, tokens: int) -> torch.Tensor:
        case = self.case
        size = (tokens, case.heads, case.key_dim)
        return (2.0 * torch.randn(size, generator=self.generator, device="cuda")).to(case.dtype)

    def expected(self, queries: torch.Tensor, counts: list[int]) -> torch.Tensor:
        case, results, first = self.case, [], 0
        for where, length, count in zip(self.lines, self.lengths, counts, strict=True):
            keys, values = self.plain.keys_values(self.plain.lines[where])
            keys, values = (
                x.double().repeat_interleave(case.heads // case.kv_heads, 0) for x in (keys, values)
            )
            mine = queries[first : first + count].double().transpose(0, 1)
            scores = mine @ keys.transpose(1, 2) / math.sqrt(case.key_dim)
            position = torch.arange(length - count, length, device="cuda")[:, None]
            scores.masked_fill_(torch.arange(length, device="cuda") > position, -math.inf)
            results.append((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
            first += count
        return torch.cat(results)

    def attention(
        self, loaded: Any, step_tokens: int = 4096, expanded_tokens: int = 1 << 15, **paths: Any
    ) -> Any:
        from worker.backends.cuda.attention import CudaAttention

        kernels, operators = loaded
        case = self.case
        return CudaAttention(
            kernels,
            operators,
            heads=case.heads,
            kv_heads=case.kv_heads,
            key_dim=case.key_dim,
            value_dim=case.values,
            dtype=case.dtype,
            block_tokens=case.block_tokens,
            max_rows=self.max_rows,
            max_blocks=self.max_blocks,
            step_tokens=step_tokens,
            device=torch.device("cuda", 0),
            is_float8=case.is_float8,
            expanded_tokens=expanded_tokens,
            **paths,
        )

    def poisoned(self, tokens: int) -> torch.Tensor:
        case = self.case
        return torch.full((tokens, case.heads * case.values), math.nan, dtype=case.dtype, device="cuda")

    def decode(self, attention: Any, queries: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        plan = attention.plan_decode(len(self.lengths), self.slots, self.kv_lengths, self.tables)
        result: torch.Tensor = attention.run(queries, self.cache, plan, out)
        return result

    def mixed(
        self,
        attention: Any,
        queries: torch.Tensor,
        starts: torch.Tensor,
        first_blocks: Sequence[int | None] = (),
    ) -> torch.Tensor:
        plan = attention.plan_mixed(
            starts.tolist(),
            self.lengths,
            self.slots,
            starts.cuda(),
            self.kv_lengths,
            self.tables,
            first_blocks,
        )
        result: torch.Tensor = attention.run(queries, self.cache, plan, self.poisoned(len(queries)))
        return result


def starts_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)


def only(path: str, split_tokens: int = 128) -> Any:
    from worker.backends.cuda.attention_paths import DecodeRule

    return (DecodeRule(path, split_tokens=split_tokens),)  # type: ignore[arg-type]


def need(loaded: Any, name: str) -> None:
    if loaded[1] is None or not (Path(loaded[1]) / name / f"{name}.so").exists():
        pytest.skip(f"the operator {name} was not built")


def agree(actual: torch.Tensor, expected: torch.Tensor) -> None:
    limit = FORGIVEN[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("lengths", DECODE_LENGTHS, ids=lambda x: f"{len(x)}rows{max(x)}")
@pytest.mark.parametrize("case", OWN, ids=str)
@pytest.mark.parametrize("path", ["tensor", "vector", *RINGS])
def test_own_decode(loaded: Any, path: str, case: Case, lengths: list[int]) -> None:
    if path != "vector" and (case.dtype != BF16 or case.block_tokens % 16):
        pytest.skip("not a shape of the tensor cores")
    if path in RINGS and not case.key_dim == case.values == 128:
        pytest.skip("not a shape of the rings")
    if (path in RINGS and path.endswith("_e4m3") != case.is_float8) or (
        path == "tensor" and case.is_float8
    ):
        pytest.skip("a path of another cache")
    world = World(case, lengths, seed=len(lengths))
    attention = world.attention(loaded, decode_paths=only(path), prefill_paths=("tiled",))
    assert attention.decode_path(len(lengths)) == path
    queries = world.queries(len(lengths))
    expected = world.expected(queries, [1] * len(lengths))
    # Twice: what one launch leaves in the workspace must not disturb the next.
    first = world.decode(attention, queries, world.poisoned(len(lengths)))
    agree(first, expected)
    again = world.decode(attention, queries, world.poisoned(len(lengths)))
    assert torch.equal(first, again)


@pytest.mark.parametrize("path", RINGS)
def test_rings_go_round(loaded: Any, path: str) -> None:
    """Rows so long for their blocks that a warp looks its lines up several times."""
    case = Case(BF16, 8, 2, 128, block_tokens=16, is_float8=path.endswith("_e4m3"))
    world = World(case, [9000, 5, 4200], seed=3)
    rules = only(path, split_tokens=1 << 14)
    attention = world.attention(loaded, decode_paths=rules, prefill_paths=("tiled",))
    queries = world.queries(3)
    agree(world.decode(attention, queries, world.poisoned(3)), world.expected(queries, [1] * 3))


@pytest.mark.parametrize("path", RINGS)
def test_rows_do_not_depend_on_their_neighbours(loaded: Any, path: str) -> None:
    """What a row of one block gives is the same to the bit, alone or among others."""
    case = Case(BF16, 32, 8, 128, is_float8=path.endswith("_e4m3"))
    world = World(case, [190, 64, 33, 127, 1, 100], seed=4)
    rules = only(path, split_tokens=256)
    attention = world.attention(loaded, decode_paths=rules, prefill_paths=("tiled",))
    queries = world.queries(6)
    together = world.decode(attention, queries, world.poisoned(6))
    for row in range(6):
        one = slice(row, row + 1)
        plan = attention.plan_decode(1, world.slots[one], world.kv_lengths[one], world.tables)
        alone = attention.run(queries[one], world.cache, plan, world.poisoned(1))
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("lengths", DECODE_LENGTHS, ids=lambda x: f"{len(x)}rows{max(x)}")
@pytest.mark.parametrize("case", FLASHINFER_DECODE, ids=str)
@pytest.mark.parametrize("path", ["xqa", "xqa_wide"])
def test_xqa_decode(loaded: Any, path: str, case: Case, lengths: list[int]) -> None:
    from worker.backends.cuda.flashinfer import xqa_name

    need(loaded, xqa_name(case.block_tokens, case.key_dim, case.heads // case.kv_heads))
    world = World(case, lengths, seed=len(lengths))
    attention = world.attention(loaded, decode_paths=only(path), prefill_paths=("tiled",))
    queries = world.queries(len(lengths))
    out = world.decode(attention, queries, world.poisoned(len(lengths)))
    agree(out, world.expected(queries, [1] * len(lengths)))


@pytest.mark.parametrize("path", ["xqa", "xqa_wide", "tensor", "vector", *RINGS])
def test_graph_replay_is_right_as_rows_grow(loaded: Any, path: str) -> None:
    from worker.backends.cuda.flashinfer import xqa_name

    case = Case(BF16, 64, 8, 128, is_float8=path.endswith("_e4m3"))
    if path.startswith("xqa"):
        need(loaded, xqa_name(64, 128, 8))
    world = World(case, [700, 1500, 64, 1, 333], seed=1)
    attention = world.attention(loaded, decode_paths=only(path), prefill_paths=("tiled",))
    rows = len(world.lengths) + 2  # the last two only pad
    scratch = torch.full((2,), world.max_rows, dtype=torch.int32, device="cuda")
    slots = torch.cat([world.slots, scratch])
    lengths = torch.ones(rows, dtype=torch.int32, device="cuda")
    queries = world.queries(rows)
    out = torch.empty((rows, case.heads * case.values), dtype=case.dtype, device="cuda")
    attention.run(queries, world.cache, attention.plan_decode(rows, slots, lengths, world.tables), out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = attention.plan_decode(rows, slots, lengths, world.tables)
        attention.run(queries, world.cache, plan, out)
    for shrink in (500, 63, 1, 0):
        grown = [max(1, length - shrink) for length in world.lengths]
        lengths[: len(grown)] = torch.tensor(grown, dtype=torch.int32, device="cuda")
        queries.copy_(world.queries(rows))
        out.fill_(math.nan)
        graph.replay()
        replayed = out[: len(grown)].clone()
        eager = torch.full_like(out, math.nan)
        plan = attention.plan_decode(rows, slots, lengths, world.tables)
        attention.run(queries, world.cache, plan, eager)
        assert torch.equal(replayed, eager[: len(grown)])
        full, lines = world.lengths, world.lines
        world.lengths, world.lines = grown, [w[:n] for w, n in zip(lines, grown, strict=True)]
        agree(replayed, world.expected(queries[: len(grown)], [1] * len(grown)))
        world.lengths, world.lines = full, lines


STEPS = [
    # tokens of each row in the step, tokens before it
    ([1, 1, 1], [0, 99, 1023]),
    ([2], [0]),
    ([33], [0]),
    ([257], [131]),
    ([1, 1, 5, 1, 130, 64, 1], [700, 64, 0, 10, 1, 200, 65]),
    ([31, 32, 33, 1, 1, 1], [0, 32, 1000, 3, 0, 511]),
    ([3 + 7 * i % 40 for i in range(40)], [13 * i % 300 for i in range(40)]),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda x: f"{len(x[0])}rows{sum(x[0])}")
@pytest.mark.parametrize("case", OWN, ids=str)
def test_own_mixed(loaded: Any, case: Case, step: tuple[list[int], list[int]]) -> None:
    counts, before = step
    lengths = [a + b for a, b in zip(counts, before, strict=True)]
    world = World(case, lengths, seed=len(lengths))
    rules = only("vector")
    attention = world.attention(loaded, decode_paths=rules, prefill_paths=("tiled",))
    queries = world.queries(sum(counts))
    agree(world.mixed(attention, queries, starts_of(counts)), world.expected(queries, counts))


@pytest.mark.parametrize("step", STEPS, ids=lambda x: f"{len(x[0])}rows{sum(x[0])}")
@pytest.mark.parametrize(("case", "path"), FLASHINFER_PREFILL, ids=str)
def test_flashinfer_mixed(loaded: Any, case: Case, path: str, step: tuple[list[int], list[int]]) -> None:
    from worker.backends.cuda.flashinfer import prefill_name

    need(loaded, prefill_name(case.key_dim, path == "fa3"))
    counts, before = step
    lengths = [a + b for a, b in zip(counts, before, strict=True)]
    world = World(case, lengths, seed=len(lengths))
    attention = world.attention(loaded, prefill_paths=(path,))
    queries = world.queries(sum(counts))
    agree(world.mixed(attention, queries, starts_of(counts)), world.expected(queries, counts))


@pytest.mark.parametrize(
    ("counts", "before", "runs"),
    [
        ([1024], [0], {0}),
        ([1500], [1700], {0}),
        ([1, 1100, 40, 1, 1025, 1], [70, 0, 300, 5, 64, 9], {1, 4}),
        ([1030, 1200, 1024], [1, 127, 900], {0, 2}),
        ([1279, 1281], [1153, 0], {0, 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "case",
    [Case(BF16, 32, 8, 128), Case(BF16, 10, 2, 128), Case(BF16, 6, 6, 128, block_tokens=16)],
    ids=str,
)
def test_long_rows_that_are_runs(
    loaded: Any, case: Case, counts: list[int], before: list[int], runs: set[int]
) -> None:
    """Twice in turn: plans of two steps have memory of their own."""
    from worker.backends.cuda.flashinfer import prefill_name

    need(loaded, prefill_name(case.key_dim, is_fa3=True))
    lengths = [a + b for a, b in zip(counts, before, strict=True)]
    world = World(case, lengths, seed=sum(counts), runs=frozenset(runs))
    firsts = [blocks[0] if row in runs else None for row, blocks in enumerate(world.blocks)]
    attention = world.attention(loaded, prefill_paths=("fa3",))
    first, second = world.queries(sum(counts)), world.queries(sum(counts))
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    found = [world.mixed(attention, queries, starts_of(counts), firsts) for queries in (first, second)]
    for queries, actual in zip((first, second), found, strict=True):
        agree(actual, world.expected(queries, counts))
    by_pages = world.mixed(attention, first, starts_of(counts))
    assert not torch.equal(by_pages, found[0]), "tiles of other sizes round otherwise: no run was taken"


@pytest.mark.parametrize("expanded_tokens", [1, 300, 1400])
def test_what_does_not_fit_expanded_is_attended_in_tiles(loaded: Any, expanded_tokens: int) -> None:
    from worker.backends.cuda.flashinfer import prefill_name

    need(loaded, prefill_name(128, is_fa3=True))
    counts, before = [30, 5, 130, 64, 1], [200, 10, 1000, 200, 65]
    world = World(
        Case(BF16, 8, 2, 128, is_float8=True), [a + b for a, b in zip(counts, before, strict=True)], seed=6
    )
    attention = world.attention(loaded, expanded_tokens=expanded_tokens, prefill_paths=("fa3",))
    queries = world.queries(sum(counts))
    agree(world.mixed(attention, queries, starts_of(counts)), world.expected(queries, counts))


def test_plans_alternate(loaded: Any) -> None:
    """A plan stays good while the next one is made, whatever the device is doing."""
    from worker.backends.cuda.flashinfer import prefill_name

    need(loaded, prefill_name(128, is_fa3=True))
    world = World(Case(BF16, 32, 8, 128), [900, 700], seed=5)
    attention = world.attention(loaded, prefill_paths=("fa3",))
    counts = [[200, 40], [17, 300], [64, 64], [3, 2]]
    queries = [world.queries(sum(c)) for c in counts]
    starts = [starts_of(c).tolist() for c in counts]
    on_device = [starts_of(c).cuda() for c in counts]
    outs = [world.poisoned(sum(c)) for c in counts]
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    for i, out in enumerate(outs):
        plan = attention.plan_mixed(
            starts[i], world.lengths, world.slots, on_device[i], world.kv_lengths, world.tables
        )
        attention.run(queries[i], world.cache, plan, out)
    for i, out in enumerate(outs):
        agree(out, world.expected(queries[i], counts[i]))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_steps_do_not_wait_for_the_device(loaded: Any) -> None:
    case = Case(BF16, 32, 8, 128)
    world = World(case, [300, 500, 40], seed=2)
    attention = world.attention(loaded)
    queries = world.queries(102)
    starts = [0, 1, 101, 102]
    on_device = torch.tensor(starts, dtype=torch.int32, device="cuda")

    def steps() -> None:
        plan = attention.plan_mixed(
            starts, world.lengths, world.slots, on_device, world.kv_lengths, world.tables
        )
        attention.run(queries, world.cache, plan)
        decode = attention.plan_decode(3, world.slots, world.kv_lengths, world.tables)
        attention.run(queries[:3], world.cache, decode)

    steps()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
