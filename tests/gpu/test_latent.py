"""Latent attention against float64, each head's keys and values written out; NaN where none may be read."""

import math
import os
import warnings
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cuda.bindings")

from benchmarks.make_checkpoint import write_checkpoint  # noqa: E402
from benchmarks.rank_on_gpu import cuda_instance  # noqa: E402
from kv.tensors import LayerCache  # noqa: E402
from protocol.topology import Topology  # noqa: E402
from tests.golden.harness import Driver, run_ranks_as_threads  # noqa: E402
from tests.gpu.test_runner import BFLOAT16_BOUND, far, jobs, outcome  # noqa: E402
from worker.backends.base import LatentHeads  # noqa: E402
from worker.backends.cpu_float8 import store_rounded  # noqa: E402

pytestmark = pytest.mark.gpu

BF16, F32 = torch.bfloat16, torch.float32
FORGIVEN = {BF16: 2e-2, F32: 5e-5}


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    heads: int
    latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128
    block_tokens: int = 64
    is_float8: bool = False

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        kv = "-float8" if self.is_float8 else ""
        return f"{name}-{self.heads}-{self.latent}-{self.rope}-{self.nope}-{self.block_tokens}{kv}"


TINY = {"latent": 32, "rope": 4, "nope": 6, "value": 4, "block_tokens": 16}
CASES = [
    Case(BF16, 8),
    Case(BF16, 16, block_tokens=16),
    Case(BF16, 5, block_tokens=32),
    Case(BF16, 33),
    Case(BF16, 64),
    Case(BF16, 8, is_float8=True),
    Case(BF16, 16, block_tokens=16, is_float8=True),
    Case(BF16, 64, is_float8=True),
    Case(F32, 3),
    Case(F32, 8, **TINY),
    Case(F32, 1, 40, 8, 16, 24, 5),
    Case(F32, 8, **TINY, is_float8=True),
    Case(BF16, 8, **TINY),
    Case(BF16, 2, 96, 32, 64, 64, 24, is_float8=True),
]
EXPANDED = [Case(BF16, 8), Case(BF16, 16, block_tokens=16), Case(BF16, 64), Case(BF16, 8, is_float8=True)]
DECODE_LENGTHS = [
    [1],
    [64],
    [4099],
    [1, 15, 16, 17, 63, 64, 65, 127, 700, 2049, 513],
    [5 + 37 * i % 400 for i in range(67)],
]
COUNTS_LENGTHS = [
    ([1, 3, 1], [200, 130, 1]),
    ([5], [5]),
    ([1, 1, 40, 17, 129, 1], [300, 1, 40, 190, 1000, 65]),
    ([70, 300], [700, 333]),
    ([16, 2, 33], [65, 2, 600]),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels, and the directory of operators or None: ``TEST_OPERATORS``, or the user's own."""
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

    def __init__(self, case: Case, lengths: list[int], seed: int) -> None:
        self.case, self.lengths = case, lengths
        self.generator = torch.Generator("cuda").manual_seed(seed)
        block, width = case.block_tokens, case.latent + case.rope
        self.max_rows = len(lengths) + 3
        self.max_blocks = max(-(-length // block) for length in lengths) + 5
        num_blocks = sum(-(-length // block) for length in lengths) + 7
        order = torch.randperm(num_blocks, generator=self.generator, device="cuda").tolist()
        tables = torch.full((self.max_rows + 1, self.max_blocks), 1 << 30, dtype=torch.int32)
        slots = torch.randperm(self.max_rows, generator=self.generator, device="cuda").tolist()
        slots = slots[: len(lengths)]
        self.where = []
        plain = torch.full((num_blocks * block, width), math.nan, dtype=case.dtype, device="cuda")
        self.plain = plain
        self.cache = LayerCache(0, plain, 1, width, 0)
        if case.is_float8:
            # Codes that are no numbers, under scales that are infinite.
            pages = torch.full((num_blocks, block * (width + 1)), 0xFF, dtype=torch.uint8, device="cuda")
            self.cache = LayerCache(0, pages, 1, width, 0)
        for slot, length in zip(slots, lengths, strict=True):
            count = -(-length // block)
            mine, order = order[:count], order[count:]
            tables[slot, :count] = torch.tensor(mine, dtype=torch.int32)
            where = torch.tensor(mine, device="cuda").repeat_interleave(block) * block
            where = (where + torch.arange(block, device="cuda").repeat(count))[:length]
            fresh = self.random(length, width)
            if case.is_float8:
                store_rounded(fresh, self.cache, where)
            plain[where] = fresh.to(case.dtype)
            self.where.append(where)
        tables[self.max_rows] = order[0]
        self.tables = tables.cuda()
        self.slots = torch.tensor(slots, dtype=torch.int32, device="cuda")
        self.kv_lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        up = self.random(case.heads * (case.nope + case.value), case.latent) / case.latent**0.5
        scale = 1 / math.sqrt(case.nope + case.rope)
        self.heads = LatentHeads(up.to(case.dtype), case.nope, case.value, scale)

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator, device="cuda")

    def queries(self, tokens: int) -> torch.Tensor:
        case = self.case
        return (2 * self.random(tokens, case.heads, case.nope + case.rope)).to(case.dtype)

    def new_lines(self, counts: list[int]) -> torch.Tensor:
        """The step's own lines, as columns of a wider matrix."""
        found = [self.plain[where[-count:]] for where, count in zip(self.where, counts, strict=True)]
        lines = torch.cat(found)
        wide = torch.full((len(lines), lines.shape[1] + 24), math.nan, dtype=lines.dtype, device="cuda")
        wide[:, 24:] = lines
        return wide[:, 24:]

    def expected(self, queries: torch.Tensor, counts: list[int]) -> torch.Tensor:
        case, results, first = self.case, [], 0
        for where, length, count in zip(self.where, self.lengths, counts, strict=True):
            lines = self.plain[where].double()
            latents = lines[:, : case.latent]
            keys = torch.einsum("tl,hdl->htd", latents, self.heads.keys.double())
            shared = lines[None, :, case.latent :].expand(case.heads, -1, -1)
            keys = torch.cat((keys, shared), -1)
            values = torch.einsum("tl,hvl->htv", latents, self.heads.values.double())
            mine = queries[first : first + count].double().transpose(0, 1)
            scores = mine @ keys.transpose(1, 2) * self.heads.scale
            position = torch.arange(length - count, length, device="cuda")[:, None]
            scores.masked_fill_(torch.arange(length, device="cuda") > position, -math.inf)
            results.append((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
            first += count
        return torch.cat(results)

    def attention(self, loaded: Any, *, has_operators: bool = False, step_tokens: int = 4096) -> Any:
        from worker.backends.cuda.latent import CudaLatents
        from worker.backends.cuda.latent_own import LatentShape

        case = self.case
        shape = LatentShape(
            case.heads,
            case.latent,
            case.rope,
            case.nope,
            case.value,
            self.heads.scale,
            case.dtype,
            case.block_tokens,
            self.max_rows,
            self.max_blocks,
            step_tokens,
            case.is_float8,
        )
        return CudaLatents(loaded[0], loaded[1] if has_operators else None, shape, torch.device("cuda", 0))

    def poisoned(self, tokens: int) -> torch.Tensor:
        size = (tokens, self.case.heads * self.case.value)
        return torch.full(size, math.nan, dtype=self.case.dtype, device="cuda")

    def decode(self, attention: Any, queries: torch.Tensor) -> torch.Tensor:
        rows = len(self.lengths)
        plan = attention.plan_decode(rows, self.slots, self.kv_lengths, self.tables)
        out = self.poisoned(rows)
        attention.run(queries, self.new_lines([1] * rows), self.heads, self.cache, plan, out)
        return out

    def mixed(self, attention: Any, queries: torch.Tensor, counts: list[int]) -> torch.Tensor:
        starts = [0, *accumulate(counts)]
        on_device = torch.tensor(starts, dtype=torch.int32, device="cuda")
        plan = attention.plan_mixed(
            starts, self.lengths, self.slots, on_device, self.kv_lengths, self.tables
        )
        out = self.poisoned(len(queries))
        attention.run(queries, self.new_lines(counts), self.heads, self.cache, plan, out)
        return out


def agree(actual: torch.Tensor, expected: torch.Tensor) -> None:
    limit = FORGIVEN[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("lengths", DECODE_LENGTHS, ids=lambda x: f"{len(x)}rows{max(x)}")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode(loaded: Any, case: Case, lengths: list[int]) -> None:
    world = World(case, lengths, seed=len(lengths))
    attention = world.attention(loaded)
    queries = world.queries(len(lengths))
    # Twice: what one launch leaves in the workspace must not disturb the next.
    first = world.decode(attention, queries)
    agree(first, world.expected(queries, [1] * len(lengths)))
    assert torch.equal(first, world.decode(attention, queries))


@pytest.mark.parametrize(("counts", "lengths"), COUNTS_LENGTHS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_absorbed_rows_of_several_tokens(
    loaded: Any, case: Case, counts: list[int], lengths: list[int]
) -> None:
    world = World(case, lengths, seed=len(lengths))
    queries = world.queries(sum(counts))
    found = world.mixed(world.attention(loaded), queries, counts)
    agree(found, world.expected(queries, counts))


@pytest.mark.parametrize("step_tokens", [400, 4096])
@pytest.mark.parametrize(("counts", "lengths"), COUNTS_LENGTHS, ids=str)
@pytest.mark.parametrize("case", EXPANDED, ids=str)
def test_expanded_rows(
    loaded: Any, case: Case, counts: list[int], lengths: list[int], step_tokens: int
) -> None:
    """Steps of 400 tokens cut what is cached into pieces, which rows share."""
    world = World(case, lengths, seed=len(lengths))
    attention = world.attention(loaded, has_operators=True, step_tokens=step_tokens)
    if not attention.is_expanding:
        pytest.skip("the operator was not built")
    queries = world.queries(sum(counts))
    expected = world.expected(queries, counts)
    # Three steps: their plans have memory of their own, two by two.
    for _ in range(3):
        agree(world.mixed(attention, queries, counts), expected)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5], CASES[9]], ids=str)
def test_parts_of_a_context_are_merged_by_their_sums(loaded: Any, case: Case) -> None:
    """What ranks that hold parts of a context by position do."""
    from worker.backends.cuda.latent_own import LatentRows

    world = World(case, [900, 70], seed=2)
    attention, queries = world.attention(loaded), world.queries(2)
    rows = LatentRows(2, world.slots, world.kv_lengths, None, world.tables)
    whole_sums = torch.full((2, case.heads), math.nan, device="cuda")
    whole = attention.attend_latents(rows, queries, world.heads, world.cache, whole_sums).double()
    block = case.block_tokens
    cut = 4 * block if block == 16 else block
    # The first tokens; and what comes after them, by tables that begin later.
    early = torch.tensor([cut, cut], dtype=torch.int32, device="cuda")
    later = world.tables.roll(-(cut // block), 1)
    parts = []
    for lengths, tables in ((early, world.tables), (world.kv_lengths - early, later)):
        sums = torch.full((2, case.heads), math.nan, device="cuda")
        some = LatentRows(2, world.slots, lengths, None, tables)
        parts.append((attention.attend_latents(some, queries, world.heads, world.cache, sums), sums))
    merged_sums = torch.logsumexp(torch.stack([sums for _, sums in parts]) * math.log(2), 0) / math.log(2)
    torch.testing.assert_close(merged_sums, whole_sums, atol=2e-2, rtol=1e-4)
    merged = sum(part.double() * torch.exp2(sums - merged_sums)[..., None] for part, sums in parts)
    torch.testing.assert_close(merged, whole, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[9]], ids=str)
def test_absorbed_queries_may_lie_beside_their_rotated_part(loaded: Any, case: Case) -> None:
    from worker.backends.cuda.latent_own import LatentRows

    world = World(case, [900, 70], seed=3)
    attention, queries = world.attention(loaded), world.queries(2)
    together = world.random(2, case.heads, case.latent + case.rope).to(case.dtype)
    absorbed = together[..., : case.latent]
    queries[..., case.nope :] = together[..., case.latent :]
    rows = LatentRows(2, world.slots, world.kv_lengths, None, world.tables)
    outs = [torch.full_like(absorbed.contiguous(), math.nan) for _ in range(2)]
    attention.attend_lines(rows, absorbed.contiguous(), queries, world.cache, outs[0])
    attention.attend_lines(rows, absorbed, together, world.cache, outs[1])
    assert torch.equal(*outs)
    assert not outs[0].isnan().any()


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[9]], ids=str)
def test_graph_replay_is_right_as_rows_grow(loaded: Any, case: Case) -> None:
    world = World(case, [700, 1500, 64, 1, 333], seed=1)
    attention = world.attention(loaded)
    rows = len(world.lengths) + 2  # the last two only pad
    scratch = torch.full((2,), world.max_rows, dtype=torch.int32, device="cuda")
    slots = torch.cat([world.slots, scratch])
    lengths = torch.ones(rows, dtype=torch.int32, device="cuda")
    queries, out = world.queries(rows), world.poisoned(rows)
    lines = torch.full((rows, case.latent + case.rope), math.nan, dtype=case.dtype, device="cuda")

    def run() -> None:
        plan = attention.plan_decode(rows, slots, lengths, world.tables)
        attention.run(queries, lines, world.heads, world.cache, plan, out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    where, known = world.where, world.lengths
    for shrink in (500, 63, 1, 0):
        grown = [max(1, length - shrink) for length in known]
        world.where = [at[:length] for at, length in zip(where, grown, strict=True)]
        world.lengths = grown
        lengths[: len(grown)] = torch.tensor(grown, dtype=torch.int32, device="cuda")
        queries.copy_(world.queries(rows))
        out.fill_(math.nan)
        graph.replay()
        agree(out[: len(grown)], world.expected(queries[: len(grown)], [1] * len(grown)))


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rope_and_store(loaded: Any, case: Case, tokens: int) -> None:
    from worker.backends.cuda.backend import CudaStepPlan

    world = World(case, [tokens], seed=tokens)
    width = case.latent + case.rope
    queries = world.queries(tokens)
    wide = world.random(tokens, width + 7).to(case.dtype)
    lines, beside = wide[:, 7:], wide[:, :7].clone()
    angles = world.random(tokens, case.rope // 2)
    rotation = torch.stack((angles.cos(), -angles.sin(), angles.sin()), 1).to(case.dtype)
    turn = torch.complex(rotation[:, 0].double(), rotation[:, 2].double())
    want_queries, want_lines = queries.double(), lines.double()
    for want, turned in (
        (want_queries[..., case.nope :], turn[:, None]),
        (want_lines[:, case.latent :], turn),
    ):
        pairs = torch.view_as_complex(want.unflatten(-1, (-1, 2)).contiguous()) * turned
        want.copy_(torch.view_as_real(pairs).flatten(-2))
    slots = world.where[0].clone()
    slots[tokens // 2] = -1
    written = [token for token in range(tokens) if token != tokens // 2]
    before = world.cache.lines.clone()
    layer = world.attention(loaded).layer(world.heads, world.cache)
    layer.rope_and_store(queries, lines, rotation, CudaStepPlan(slots, None))
    agree(queries, want_queries)
    assert torch.equal(wide[:, :7], beside)
    if case.is_float8:
        rounded = want_lines.to(case.dtype).float()
        copy = LayerCache(0, before, 1, width, 0)
        store_rounded(rounded, copy, world.where[0])
        # A product that rounds the other way may take the next code.
        torch.testing.assert_close(lines.float(), rounded, atol=0.26, rtol=0.07)
        found = torch.empty(before.shape[0], case.block_tokens, width, device="cuda")
        codes, scales = world.cache.codes(world.cache.lines), world.cache.scales(world.cache.lines)
        factors = torch.exp2(scales[:, 0, 0].float() - 127)[..., None]
        found.copy_(codes.float() * factors)
        kept = found.flatten(0, 1)[world.where[0]][written]
        assert torch.equal(kept, lines.float()[written])
        return
    agree(lines, want_lines)
    assert torch.equal(world.cache.lines[world.where[0]][written], lines[written])
    skipped = world.where[0][tokens // 2]
    assert torch.equal(world.cache.lines[skipped], before[skipped])


@pytest.mark.parametrize(("first", "width"), [(24, 512), (5, 96), (0, 7)])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_columns_of_a_wider_matrix_are_normed(
    loaded: Any, dtype: torch.dtype, first: int, width: int
) -> None:
    from worker.backends.cuda.backend import CudaBackend

    generator = torch.Generator("cuda").manual_seed(first)
    wide = torch.randn(33, first + width + 11, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(width, generator=generator, device="cuda").to(dtype)
    before, columns = wide.clone(), slice(first, first + width)
    given = before[:, columns].double()
    want = given * torch.rsqrt(given.square().mean(1, keepdim=True) + 1e-6) * weight.double()
    backend = CudaBackend(torch.device("cuda"), loaded[0], None)  # type: ignore[arg-type]
    found = backend.rms_norm(wide[:, columns], weight, 1e-6)
    assert found.is_contiguous()
    agree(found, want)
    assert torch.equal(wide, before)
    backend.norm_heads(wide[:, columns], weight, 1e-6)
    assert torch.equal(wide[:, columns], found)
    assert torch.equal(wide[:, :first], before[:, :first])
    assert torch.equal(wide[:, first + width :], before[:, first + width :])


# Whole steps.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, dtype in (("tiny-latent", "float32"), ("small-latent", "bfloat16")):
        write_checkpoint(name, root / name, dtype=dtype)
    return {name: root / name for name in ("tiny-latent", "small-latent")}


LIMITS: dict[str, Any] = {"max_rows": 16, "num_blocks": 256, "block_tokens": 16, "context": 512}


@pytest.mark.parametrize("has_graphs", [True, False])
@pytest.mark.parametrize("chunk", [None, 40])
def test_float32_answers_as_the_cpu_does(
    models: dict[str, Path], has_graphs: bool, chunk: int | None
) -> None:
    expected, found = (jobs(512, 10, 1) for _ in range(2))
    with run_ranks_as_threads(models["tiny-latent"], Topology(), **LIMITS) as instance:
        Driver(instance).run(expected)
    more = {} if chunk is None else {"chunk": chunk}
    with cuda_instance(models["tiny-latent"], has_graphs=has_graphs, **LIMITS) as on_gpu:
        Driver(on_gpu, depth=2, **more).run(found)  # type: ignore[arg-type]
    assert [job.output_ids for job in found] == [job.output_ids for job in expected]
    assert far(found, expected) < 1e-3


@pytest.mark.parametrize(("name", "kv_dtype"), [("small-latent", "auto"), ("small-latent", "float8")])
def test_bfloat16_stays_within_its_bound(models: dict[str, Path], name: str, kv_dtype: str) -> None:
    expected, found = (jobs(2048, 4, 3) for _ in range(2))
    for job in expected + found:
        job.max_tokens = 6
    limits = LIMITS | {"dtype": "bfloat16", "kv_dtype": kv_dtype}
    with run_ranks_as_threads(models[name], Topology(), **limits) as instance:
        Driver(instance).run(expected)
    with cuda_instance(models[name], **limits) as on_gpu:
        Driver(on_gpu, chunk=40).run(found)  # type: ignore[arg-type]
    assert far(found, expected) < (1 if kv_dtype == "auto" else 2) * BFLOAT16_BOUND


@pytest.mark.parametrize("kv_dtype", ["auto", "float8"])
@pytest.mark.parametrize("name", ["tiny-latent", "small-latent"])
def test_decode_graphs_give_the_bits_of_single_launches(
    models: dict[str, Path], name: str, kv_dtype: str
) -> None:
    dtype = "float32" if name == "tiny-latent" else "bfloat16"
    outcomes = []
    for has_graphs in (True, False):
        some = jobs(512, 9, 2)
        with cuda_instance(
            models[name], **LIMITS, dtype=dtype, kv_dtype=kv_dtype, has_graphs=has_graphs
        ) as instance:
            instance.assembled.runner._pieces.clear()
            Driver(instance, depth=2).run(some)  # type: ignore[arg-type]
        outcomes.append(outcome(some))
    assert outcomes[0] == outcomes[1]


def test_no_step_waits_for_the_device(models: dict[str, Path]) -> None:
    with cuda_instance(models["small-latent"], **LIMITS, dtype="bfloat16") as instance:
        Driver(instance, depth=2, chunk=40).run(jobs(512, 6, 4))  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It says that it does not see every way of waiting.
            torch.cuda.set_sync_debug_mode("error")
        try:
            Driver(instance, depth=2, chunk=40).run(jobs(512, 6, 5))  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")
