"""The device's sampler against the CPU's: the same tokens from the same logits, seeds and positions."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from protocol.control import NewRow, TokenLogprobs
from protocol.sampling import SamplingParams
from protocol.topology import Topology
from tests.unit.comm_layouts import on_all_ranks
from worker.comm import Communicator, thread_group
from worker.sampler import NonFiniteLogitsError, RowSampling, Sampled, Sampler

pytest.importorskip("cuda.bindings")

from worker.backends.cuda.compiler import KernelCache
from worker.backends.cuda.launch import Kernels
from worker.backends.cuda.sampler import SCORES, CudaSampler, SamplerOutputs

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
MAX_ROWS = 304
ALONE = thread_group(Topology(), 20.0)[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    return KernelCache(Path(tmp_path_factory.mktemp("kernels")), "sm_90a")


@dataclass
class Row:
    params: dict[str, object]
    prompt: list[int] = field(default_factory=lambda: [0])
    output: list[int] = field(default_factory=list)
    banned: list[int] = field(default_factory=list)
    banned_until: int = 0

    def new_row(self, slot: int) -> NewRow:
        params = SamplingParams(**{"seed": 7, **self.params})  # type: ignore[arg-type]
        tokens = self.prompt + self.output
        return NewRow(slot, tokens, len(self.prompt), 0, ([],), params, self.banned, self.banned_until)

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)


class Device:
    """A sampler on the device, and the little that a runner does for it."""

    def __init__(self, cache: KernelCache, vocab: int, comm: Communicator = ALONE) -> None:
        self.last = torch.full((MAX_ROWS + 1,), -7, dtype=torch.int64, device=DEVICE)
        self.sampler = CudaSampler(Kernels(cache), comm, DEVICE, vocab, MAX_ROWS, self.last)
        self.tp, self.place = comm.topology.tp, comm.topology.tp_rank(comm.rank)
        self.room = -(-vocab // self.tp)

    def shard(self, logits: torch.Tensor) -> torch.Tensor:
        """This rank's columns; those past the vocabulary hold what a careless product may leave."""
        padded = torch.full((len(logits), self.room * self.tp), 1e30)
        padded[:, : logits.shape[1]] = logits
        return padded[:, self.place * self.room : (self.place + 1) * self.room].contiguous().to(DEVICE)

    def draw(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> SamplerOutputs:
        sampler, mine = self.sampler, self.shard(logits)
        out = poisoned(len(slots))
        before = mine.clone()
        full = sampler.is_full(slots)
        sampler.sample(mine, on_device(slots), on_device(positions), out, full)
        assert torch.equal(mine, before) or bool(mine.isnan().any())
        return SamplerOutputs(out.token_ids.cpu(), out.broken.cpu(), out.scores.cpu())

    def sample(self, logits: torch.Tensor, rows: list[Row], slots: list[int] | None = None) -> Sampled:
        slots = slots or list(range(len(rows)))
        for slot, row in zip(slots, rows, strict=True):
            self.sampler.new_row(slot, row.new_row(slot))
        self.sampler.upload()
        out = self.draw(logits, slots, [row.position for row in rows])
        found = self.sampler.read(out, self.sampler.asked(slots))
        assert self.last.cpu()[slots].tolist() == found.token_ids
        return found


def on_device(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def poisoned(rows: int) -> SamplerOutputs:
    out = SamplerOutputs.empty(rows, DEVICE)
    out.token_ids.fill_(-99)
    out.broken.fill_(-99)
    out.scores.fill_(math.nan)
    return out


def on_cpu(logits: torch.Tensor, rows: list[Row]) -> Sampled:
    states = [RowSampling.from_new_row(row.new_row(0)) for row in rows]
    return Sampler(logits.shape[1], ALONE, len(rows)).sample(logits, states, [row.position for row in rows])


def check_scores(found: TokenLogprobs | None, expected: TokenLogprobs | None) -> None:
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    assert (found.token_id, found.top_ids) == (expected.token_id, expected.top_ids)
    numbers = [found.logprob, *found.top_logprobs]
    np.testing.assert_allclose(numbers, [expected.logprob, *expected.top_logprobs], rtol=0, atol=1e-9)


def check(found: Sampled, expected: Sampled) -> None:
    assert found.token_ids == expected.token_ids
    for mine, other in zip(found.logprobs, expected.logprobs, strict=True):
        check_scores(mine, other)


def variants(vocab: int) -> list[Row]:
    """Every parameter alone, and together."""
    generator = np.random.default_rng(vocab)

    def some(count: int) -> list[int]:
        return generator.integers(0, vocab, count).tolist()  # type: ignore[no-any-return]

    alone: list[dict[str, object]] = [
        {},
        *({"temperature": t} for t in (0.0, 0.01, 0.6, 2.0, 100.0)),
        *({"top_k": k} for k in (1, 2, 50, vocab // 2, vocab - 1, vocab, 2**31 - 1)),
        *({"top_p": p} for p in (1e-300, 0.1, 0.5, 0.9, 0.9999, 1.0 - 1e-12)),
        *({"min_p": p} for p in (1e-9, 0.05, 0.5, 1.0)),
        *({"logprobs": k} for k in (0, 1, 20)),
        {"logit_bias": {token: 5.0 * (-1) ** token for token in some(40)}},
        {"logit_bias": {0: 100.0, vocab - 1: 100.0}, "logprobs": 3},
    ]
    together: list[dict[str, object]] = [
        {"top_k": 40, "top_p": 0.8},
        {"top_k": 5, "top_p": 0.99, "min_p": 0.01, "temperature": 1.5},
        {"top_p": 0.95, "min_p": 0.1, "logprobs": 5},
        {"temperature": 0.0, "top_k": 3, "top_p": 0.2, "logprobs": 2},
    ]
    penalties: list[dict[str, object]] = [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.5, "temperature": 0.0},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.7},
        {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.25, "temperature": 0.0},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "top_p": 0.9, "logprobs": 7}
        | {"logit_bias": dict.fromkeys(some(9), 2.5)},
    ]
    rows = [Row(params) for params in alone + together]
    rows += [Row(params, some(700), some(300)) for params in penalties]
    rows += [
        Row(params, banned=some(60), banned_until=5) for params in ({}, {"top_k": 20}, {"temperature": 0.0})
    ]
    rows += [
        Row({"logit_bias": dict.fromkeys(some(20), 8.0)}, banned=some(20), banned_until=1),
        Row({"logit_bias": dict.fromkeys(range(0, vocab, max(1, vocab // 1000)), 3.0)}, banned_until=9),
    ]
    for seed, row in enumerate(rows):
        row.params["seed"] = 2**62 // (seed + 1)
    return rows


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0])
@pytest.mark.parametrize("vocab", [131, 1000, 49152, 128256])
def test_every_parameter_equals_the_cpu(cache: KernelCache, vocab: int, spread: float) -> None:
    torch.manual_seed(vocab)
    rows = variants(vocab)
    logits = torch.randn(len(rows), vocab) * spread
    check(Device(cache, vocab).sample(logits, rows), on_cpu(logits, rows))


@pytest.mark.parametrize("vocab", [1, 2, 3, 31, 33, 131, 1023])
def test_tiny_vocabularies_with_ties_equal_the_cpu(cache: KernelCache, vocab: int) -> None:
    torch.manual_seed(vocab)
    rows = [row for row in variants(max(vocab, 2)) if all(t < vocab for t in row.prompt + row.output)]
    logits = torch.randint(-3, 4, (len(rows), vocab)) / 2.0
    check(Device(cache, vocab).sample(logits, rows), on_cpu(logits, rows))


@pytest.mark.parametrize(("vocab", "count"), [(131, 300), (49152, 300), (128256, 1)])
def test_seeds_and_positions_equal_the_cpu(cache: KernelCache, vocab: int, count: int) -> None:
    torch.manual_seed(count)
    kinds: list[dict[str, object]] = [
        {},
        {"top_p": 0.9},
        {},
        {"temperature": 0.0},
        {"top_k": 30},
        {"min_p": 0.02},
    ]
    rows = [
        Row({"seed": (i * 0x9E3779B97F4A7C15) % 2**63, **kinds[i % len(kinds)]}, [0] * (1 + 37 * i % 500))
        for i in range(count)
    ]
    logits = torch.randn(count, vocab) * 2.0
    slots = torch.randperm(MAX_ROWS)[:count].tolist()
    device = Device(cache, vocab)
    check(device.sample(logits, rows, slots), on_cpu(logits, rows))
    assert sum((device.last == -7).tolist()) == MAX_ROWS + 1 - count


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}])
def test_logits_at_the_edges(cache: KernelCache, params: dict[str, object]) -> None:
    vocab = 517
    logits = torch.randn(8, vocab)
    logits[0, 1:] = -math.inf
    logits[1, :-1] = -math.inf
    logits[2, ::2] = -math.inf
    logits[3] = torch.tensor([-0.0, 0.0]).repeat(vocab)[:vocab]
    logits[4] = 3e38
    logits[5] = -3e38
    logits[6, 100:400] = 3e38
    logits[7] *= 1e-30
    rows = [Row({"seed": i, "logprobs": 4, **params}) for i in range(8)]
    check(Device(cache, vocab).sample(logits, rows), on_cpu(logits, rows))
    banned = list(range(200))
    few = [
        Row(dict(params), banned=banned, banned_until=9),
        Row(dict(params), banned=banned, banned_until=1),
    ]
    flat = torch.ones(2, 201)
    check(Device(cache, 201).sample(flat, few), on_cpu(flat, few))
    # Where everything is banned, nothing is.
    few = [Row(dict(params), banned=banned, banned_until=9)]
    flat = torch.randn(1, 200)
    check(Device(cache, 200).sample(flat, few), on_cpu(flat, few))


def test_what_is_left_of_bans_may_be_impossible(cache: KernelCache) -> None:
    logits = torch.full((3, 50), -math.inf)
    logits[:, 30] = 1.0
    kinds: list[dict[str, object]] = [{}, {"temperature": 0.0}, {"top_k": 4}]
    found = Device(cache, 50).sample(logits, [Row(p, banned=[30], banned_until=9) for p in kinds])
    assert found.token_ids == [0, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_rows_are_named_and_leave_the_others(cache: KernelCache, bad: float) -> None:
    vocab = 5003
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.7},
        {"top_k": 9},
        {"min_p": 0.2},
    ]
    kinds = [{**p, **more} for p in kinds for more in ({}, {"logprobs": 4}, {"repetition_penalty": 1.2})]
    rows = [Row(dict(p), [1, 2, 3]) for p in kinds for _ in range(2)]
    logits = torch.randn(len(rows), vocab)
    expected = on_cpu(logits, rows)
    for i in range(0, len(rows), 2):
        logits[i, (i * 911) % vocab if bad != -math.inf else slice(None)] = bad
    device = Device(cache, vocab)
    for slot, row in enumerate(rows):
        device.sampler.new_row(slot, row.new_row(slot))
    device.sampler.upload()
    slots = list(range(len(rows)))
    out = device.draw(logits, slots, [row.position for row in rows])
    assert out.broken.tolist() == [1, 0] * (len(rows) // 2)
    assert out.token_ids[1::2].tolist() == expected.token_ids[1::2]
    assert all(0 <= token < vocab for token in device.last.cpu()[slots].tolist())
    with pytest.raises(NonFiniteLogitsError) as caught:
        device.sampler.read(out, device.sampler.asked(slots))
    assert caught.value.rows == slots[::2]


@pytest.mark.parametrize("top_k", [0, 12])
def test_penalties_over_steps_equal_the_cpu(cache: KernelCache, top_k: int) -> None:
    torch.manual_seed(5)
    vocab, count = 401, 6
    params: list[dict[str, object]] = [
        {
            "repetition_penalty": 1.0 + 0.2 * (i % 3),
            "frequency_penalty": 0.3,
            "presence_penalty": 0.4 * (i % 2),
        }
        | {"seed": i, "top_k": top_k, "temperature": 0.0 if i == 2 else 0.5}
        for i in range(count)
    ]
    rows = [Row(p, torch.randint(vocab, (9,)).tolist()) for p in params]
    device, cpu = Device(cache, vocab), Sampler(vocab, ALONE, count)
    states = [RowSampling.from_new_row(row.new_row(0)) for row in rows]
    slots = [MAX_ROWS - 1 - i for i in range(count)]
    for step in range(24):
        if step in {0, 9}:  # 9: some begin again with their answer so far
            for slot, row in list(zip(slots, rows, strict=True))[: count if step == 0 else 3]:
                device.sampler.new_row(slot, row.new_row(slot))
            device.sampler.upload()
        logits = torch.randn(count, vocab)
        positions = [row.position for row in rows]
        expected = cpu.sample(logits, states, positions).token_ids
        assert device.draw(logits, slots, positions).token_ids.tolist() == expected, step
        for row, state, token in zip(rows, states, expected, strict=True):
            row.output.append(token)
            state.append(token)


def test_a_graph_follows_changed_parameters(cache: KernelCache) -> None:
    torch.manual_seed(6)
    vocab, rows, padded = 3001, 5, 8
    device = Device(cache, vocab)
    logits = torch.zeros(padded, vocab, device=DEVICE)
    slots = torch.full((padded,), MAX_ROWS, dtype=torch.int32, device=DEVICE)
    positions = torch.ones(padded, dtype=torch.int32, device=DEVICE)
    graphs = {}
    out = poisoned(padded)
    for full in (False, True):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            device.sampler.sample(logits, slots, positions, out, full)
        stream.synchronize()
        graphs[full] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[full]):
            device.sampler.sample(logits, slots, positions, out, full)
    kinds = variants(vocab)
    names = ("top_k", "top_p", "min_p", "logprobs")
    for step in range(30):
        full = step % 2 == 1
        some = [kinds[(step * rows + i) % len(kinds)] for i in range(rows)]
        if not full:
            some = [
                replace(row, params={k: v for k, v in row.params.items() if k not in names}) for row in some
            ]
        mine = torch.randperm(MAX_ROWS)[:rows].tolist()
        for slot, row in zip(mine, some, strict=True):
            device.sampler.new_row(slot, row.new_row(slot))
        device.sampler.upload()
        host = torch.randn(rows, vocab)
        logits[:rows] = host.to(DEVICE)
        slots[:rows] = on_device(mine)
        positions[:rows] = on_device([row.position for row in some])
        for tensor in (out.token_ids, out.broken):
            tensor.fill_(-99)
        graphs[full].replay()
        copied = SamplerOutputs(out.token_ids.cpu(), out.broken.cpu(), out.scores.cpu())
        check(device.sampler.read(copied, device.sampler.asked(mine)), on_cpu(host, some))
        assert copied.token_ids[rows:].tolist() == copied.broken[rows:].tolist() == [0] * (padded - rows)
        for slot in mine:
            device.sampler.release(slot)
    assert int(device.last[MAX_ROWS]) == -7


@pytest.mark.parametrize("full", [False, True])
def test_rows_of_the_scratch_slot_write_nothing(cache: KernelCache, full: bool) -> None:
    device = Device(cache, 700)
    out = poisoned(9)
    logits = torch.full((9, 700), math.nan, device=DEVICE)
    device.sampler.sample(logits, on_device([MAX_ROWS] * 9), on_device([1] * 9), out, full)
    assert out.token_ids.tolist() == out.broken.tolist() == [0] * 9
    assert (device.last == -7).all()


@pytest.mark.parametrize("vocab", [1, 17, 131, 49152])
@pytest.mark.parametrize("k", [0, 1, 20])
def test_prompt_scores_equal_the_cpu(cache: KernelCache, vocab: int, k: int) -> None:
    torch.manual_seed(k)
    logits = torch.cat([torch.randn(40, vocab) * 4, torch.randint(-2, 3, (7, vocab)) / 4.0])
    tokens = torch.randint(vocab, (47,)).tolist()
    sampler = Device(cache, vocab).sampler
    scores = sampler.score(logits.to(DEVICE), on_device(tokens), k).cpu()
    assert scores.shape == (47, SCORES)
    expected = Sampler(vocab, ALONE, 47).score(logits, tokens, k)
    for mine, other in zip(sampler.read_scores(scores, tokens, k), expected, strict=True):
        check_scores(mine, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_prompt_scores_are_an_error(cache: KernelCache, bad: float) -> None:
    sampler = Device(cache, 90).sampler
    logits = torch.zeros(3, 90)
    logits[1, 77] = bad
    scores = sampler.score(logits.to(DEVICE), on_device([0, 1, 2]), 5).cpu()
    with pytest.raises(NonFiniteLogitsError, match=r"rows \[1\]"):
        sampler.read_scores(scores, [0, 1, 2], 5)


@pytest.mark.parametrize(("vocab", "tp"), [(3, 4), (131, 2), (1001, 3), (49152, 4)])
def test_ranks_agree_with_one_another_and_the_cpu(cache: KernelCache, vocab: int, tp: int) -> None:
    torch.manual_seed(tp)
    rows = [row for row in variants(vocab) if all(t < vocab for t in row.prompt + row.output)]
    logits = (
        torch.randn(len(rows), vocab) if vocab > 200 else torch.randint(-3, 4, (len(rows), vocab)) / 2.0
    )
    tokens = torch.randint(vocab, (len(rows),)).tolist()

    def work(comm: Communicator) -> tuple[Sampled, list[TokenLogprobs]]:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
            torch.cuda.synchronize()
        device = Device(cache, vocab, comm)
        found = device.sample(logits, rows)
        scores = device.sampler.score(device.shard(logits), on_device(tokens), 6).cpu()
        return found, device.sampler.read_scores(scores, tokens, 6)

    cache.load("sampler")
    expected = on_cpu(logits, rows)
    scored = Sampler(vocab, ALONE, len(rows)).score(logits, tokens, 6)
    for found, scores in on_all_ranks(Topology(tp=tp), work):
        check(found, expected)
        for mine, other in zip(scores, scored, strict=True):
            check_scores(mine, other)


def test_uploads_do_not_overtake_one_another(cache: KernelCache) -> None:
    device = Device(cache, 20011)
    rng = np.random.default_rng(1)
    for _ in range(6):
        rows = [
            Row({"repetition_penalty": 1.5, "temperature": 0.0}, rng.integers(0, 20011, 2000).tolist())
            for _ in range(40)
        ]
        for slot, row in enumerate(rows):
            device.sampler.new_row(slot, row.new_row(slot))
        device.sampler.upload()
    found = device.draw(torch.ones(40, 20011), list(range(40)), [2000] * 40).token_ids.tolist()
    # All logits are 1, those of seen tokens less: the first unseen token is the highest.
    assert found == [next(t for t in range(20011) if t not in set(row.prompt)) for row in rows]


@pytest.mark.parametrize("count", [1, 64, 256])
def test_print_how_long_a_draw_takes(cache: KernelCache, count: int) -> None:
    vocab = 128256
    device = Device(cache, vocab)
    # Larger than L2 together for many rows; as after a matrix product, just written for few.
    logits = torch.randn(count, vocab, device=DEVICE) * 3.0
    slots, positions = on_device(list(range(count))), on_device([9] * count)
    kinds: dict[str, dict[str, object]] = {
        "greedy": {"temperature": 0.0},
        "temperature": {"temperature": 0.8},
        "penalties": {"repetition_penalty": 1.1},
        "top_p": {"top_p": 0.9},
        "top_k": {"top_k": 50},
        "top_k, top_p, min_p": {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
        "logprobs": {"logprobs": 5},
    }
    out = poisoned(count)
    for name, params in kinds.items():
        for slot in range(count):
            device.sampler.new_row(slot, Row({**params, "seed": slot}).new_row(slot))
        device.sampler.upload()
        full = device.sampler.is_full(range(count))
        device.sampler.sample(logits, slots, positions, out, full)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                device.sampler.sample(logits, slots, positions, out, full)
        times = []
        for _ in range(9):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 100.0)
        ceiling = count * vocab * 4 / 4.66e6
        middle = sorted(times)[4]
        print(f"{count:4} rows, {name:20}: {middle:7.1f} us a draw; reading the logits once {ceiling:5.1f}")
