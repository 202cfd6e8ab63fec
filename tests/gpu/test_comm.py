"""The CUDA communicator between processes that share a GPU: right at any size, and never hanging.

Kernels that wait for each other take turns on one GPU, up to 33 ms each with eight ranks: few, small calls.
"""

import random
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import pytest
import torch

from protocol.abort_page import write_abort
from protocol.topology import Topology
from tests.gpu.comm_ranks import ranks, run_all
from worker.comm_group import CollectiveError, sum_in_rank_order

if TYPE_CHECKING:
    from worker.backends.cuda.comm import CudaCommunicator

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

BF16, F32 = torch.bfloat16, torch.float32
EPS = 1e-5
REPLAYS = 50


def numbers(seed: int, shape: tuple[int, ...] | int, dtype: torch.dtype = F32) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device="cuda", dtype=F32).to(dtype)
    shape = (shape,) if isinstance(shape, int) else shape
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, device="cuda").to(dtype)


def dawdle(own: random.Random) -> None:
    """Be late on the host or on the device, or not at all."""
    match own.randrange(4):
        case 0:
            time.sleep(own.random() * 0.01)
        case 1:
            torch.cuda._sleep(own.randrange(3_000_000))


def summed(
    comm: "CudaCommunicator", seed: int, shape: tuple[int, ...] | int, dtype: torch.dtype
) -> torch.Tensor:
    parts = [numbers(seed + r, shape, dtype) for r in range(comm.topology.tp)]
    out = parts[0].clone()
    if len(parts) > 1:
        sum_in_rank_order(parts, out)
    return out


def group_body(comm: "CudaCommunicator", pipe: Connection) -> int:
    own, tp, place = random.Random(comm.rank), comm.topology.tp, comm.topology.tp_rank(comm.rank)
    check_all_reduce(comm, own, tp, place)
    check_copies(comm, own, tp, place)
    check_fused(comm, own, place)
    check_graph(comm, own, place)
    comm.barrier()
    comm.check()
    if comm.rank == tp - 1:
        return comm.buffer_bytes
    began = time.monotonic()  # the last rank leaves without a word
    comm.all_reduce(numbers(0, 100))
    torch.cuda.synchronize()
    assert time.monotonic() - began < 3.0
    with pytest.raises(CollectiveError, match=r"all_reduce with rank \d+: (it has left|the supervisor)"):
        comm.check()
    return comm.buffer_bytes


def check_all_reduce(comm: "CudaCommunicator", own: random.Random, tp: int, place: int) -> None:
    alike = random.Random(tp)
    sizes = [(1, BF16), (7, F32), (4096, BF16), (65_537, F32), (alike.randrange(1, 100_000), BF16)]
    sizes += [
        (32_768, BF16),
        (32_769, BF16),
        (131_073, BF16),
        (4_500_001, BF16),
        (8, torch.float64),
        (5, torch.int32),
    ]
    for index, (count, dtype) in enumerate(sizes):
        seed = 100 * index
        buffer = torch.full((count + 9,), 77, dtype=dtype, device="cuda")
        x = buffer[index % 2 : index % 2 + count]  # every second one does not start at 16 bytes
        x.copy_(numbers(seed + place, count, dtype))
        dawdle(own)
        comm.all_reduce(x)
        assert torch.equal(x, summed(comm, seed, count, dtype)), f"{count} of {dtype}"
        assert torch.all(buffer[index % 2 + count :] == 77)
    x = numbers(place, (6, 10), F32)
    comm.all_reduce(x.t())
    assert torch.equal(x, summed(comm, 0, (6, 10), F32))


def check_copies(comm: "CudaCommunicator", own: random.Random, tp: int, place: int) -> None:
    for index, (shape, dtype) in enumerate(
        [
            ((1,), torch.int64),
            ((3, 5), BF16),
            ((700_001,), torch.float64),
            ((4, 33), torch.int32),
            ((2, 0), F32),
        ]
    ):
        dawdle(own)
        found = comm.all_gather(numbers(index * 100 + place, shape, dtype))
        expected = torch.stack([numbers(index * 100 + r, shape, dtype) for r in range(tp)])
        assert torch.equal(found, expected), f"all_gather {shape} {dtype}"
    for index, (rows, width, dtype) in enumerate(
        [(1, 7, BF16), (3, 129, F32), (512, 4097, BF16), (2, 3, torch.int64)]
    ):
        dawdle(own)
        shape = (rows * tp, width)
        found = comm.reduce_scatter(numbers(index * 100 + place, shape, dtype))
        expected = summed(comm, index * 100, shape, dtype)[rows * place : rows * (place + 1)]
        assert torch.equal(found, expected), f"reduce_scatter {shape} {dtype}"
    with pytest.raises(ValueError, match="dealt evenly"):
        comm.reduce_scatter(numbers(0, (tp + 1, 2)))
    for index, (width, dtype, most) in enumerate([(5, BF16, 4), (1, torch.uint8, 9), (1000, F32, 900)]):
        alike = random.Random(index)
        table = [[alike.randrange(most) for _ in range(tp)] for _ in range(tp)]
        dawdle(own)
        sent = [numbers(index * 100 + r, (sum(table[r]), width), F32).to(dtype) for r in range(tp)]
        found = comm.all_to_all(sent[place], table[place])
        parts = [sent[r].split(table[r])[place] for r in range(tp)]
        assert torch.equal(found, torch.cat(parts)), f"all_to_all {table} of {width} {dtype}"


def check_fused(comm: "CudaCommunicator", own: random.Random, place: int) -> None:
    seen = 0
    for index, (rows, width) in enumerate(
        [(1, 4096), (3, 576), (70, 64), (1, 12_288), (2, 7168), (4, 1032)]
    ):
        for dtype in (BF16, F32):
            x = numbers(index * 100 + place, (rows, width), dtype)
            if not comm.fuses(x):
                continue
            seen += 1
            residual, weight = numbers(7, (rows, width), dtype), numbers(8, width, dtype)
            update = summed(comm, index * 100, (rows, width), dtype)
            expected = (residual.float() + update.float()).to(dtype)
            dawdle(own)
            found = comm.all_reduce_norm(x, residual, weight, EPS)
            assert torch.equal(residual, expected), f"residual of {rows} x {width} {dtype}"
            exact = expected.double()
            exact *= torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPS) * weight.double()
            bound = 2.0**-7 if dtype is BF16 else 1e-5
            torch.testing.assert_close(found.double(), exact, rtol=bound, atol=1e-5)
    assert seen >= 9
    assert not comm.fuses(numbers(0, (3, 9), BF16))
    assert not comm.fuses(torch.zeros(1024, 4096, dtype=BF16, device="cuda"))


def check_graph(comm: "CudaCommunicator", own: random.Random, place: int) -> None:
    x, wide = torch.zeros(333, device="cuda"), torch.zeros(2, 512, device="cuda", dtype=BF16)
    residual = torch.zeros(2, 512, device="cuda", dtype=BF16)
    weight = numbers(8, 512, BF16)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        comm.all_reduce(x)
        normed = comm.all_reduce_norm(wide, residual, weight, EPS)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for replay in range(REPLAYS):
        x.copy_(numbers(replay * 100 + place, 333))
        wide.copy_(numbers(replay * 100 + place, (2, 512), BF16))
        residual.copy_(numbers(replay, (2, 512), BF16))
        normed.fill_(float("nan"))
        if replay % 10 == 3:
            dawdle(own)
        graph.replay()
        expected = (
            numbers(replay, (2, 512), BF16).float() + summed(comm, replay * 100, (2, 512), BF16).float()
        ).to(BF16)
        scale = torch.rsqrt(expected.float().square().mean(-1, keepdim=True) + EPS)
        norm = expected.float() * scale * weight.float()
        wrong += (x != summed(comm, replay * 100, 333, F32)).sum() + (residual != expected).sum()
        wrong += (~torch.isclose(normed.float(), norm, rtol=2.0**-7, atol=1e-5)).sum()
    assert wrong.item() == 0
    comm.check()


def positions_body(comm: "CudaCommunicator", pipe: Connection) -> int:
    """The collectives of a dcp group, among those of the group that it is a part of."""
    topology, own, alike = comm.topology, random.Random(comm.rank), random.Random(9)
    group, size = comm.dcp, topology.dcp
    assert group is not None
    index, first = topology.dcp_rank(topology.tp_rank(comm.rank)), topology.dcp_group(comm.rank)[0]
    for number in range(6):
        seed = 1000 * number + first
        dawdle(own)
        total = numbers(topology.tp_rank(comm.rank) + 1000 * number, 700)
        comm.all_reduce(total)
        assert torch.equal(total, summed(comm, 1000 * number, 700, F32))
        rows, heads, dim = alike.randrange(1, 40), alike.randrange(1, 6), alike.choice([8, 32, 128])
        if number == 5:
            rows, heads, dim = 300, 8, 512  # in pieces
        dtype = (BF16, F32)[number % 2]
        x = numbers(seed + index, (rows, heads, dim), dtype)
        found = group.gather_rows(x)
        everyone = [numbers(seed + r, (rows, heads, dim), dtype) for r in range(size)]
        assert torch.equal(found, torch.stack(everyone, 1)), f"gather_rows {rows} {heads} {dim}"
        assert torch.equal(group.all_gather(x), torch.stack(everyone)), f"all_gather {rows} {heads} {dim}"
        scattered = group.reduce_scatter(torch.stack(everyone) + index)
        expected = torch.zeros_like(x)
        sum_in_rank_order([everyone[index] + r for r in range(size)], expected)
        assert torch.equal(scattered[0], expected), f"reduce_scatter {rows} {heads} {dim}"
        dawdle(own)
        check_merge(comm, seed, (rows, size * heads, dim), dtype)
    odd = numbers(first + index, (5, 3), BF16)  # rows of six bytes
    assert torch.equal(
        group.gather_rows(odd), torch.stack([numbers(first + r, (5, 3), BF16) for r in range(size)], 1)
    )
    check_positions_graph(comm, own, first, index)
    comm.barrier()
    comm.check()
    return comm.buffer_bytes


def parts_of(
    seed: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank's part of some contexts gives, and how much it counts: a fifth of the parts are empty."""
    found = numbers(seed, shape, dtype)
    sums = 6 * numbers(seed + 500, shape[:2])
    is_empty = numbers(seed + 600, shape[:2]) < -0.8
    is_empty[0] = True  # nobody has anything of the first token
    return found.masked_fill(is_empty[..., None], 0.0), sums.masked_fill(is_empty, float("-inf"))


def merged(
    size: int, index: int, seed: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> torch.Tensor:
    parts = [parts_of(seed + r, shape, dtype) for r in range(size)]
    sums = torch.stack([sums for _, sums in parts]).double() * 0.6931471805599453
    weights = sums.softmax(0).nan_to_num()[..., None]
    found = (torch.stack([found for found, _ in parts]).double() * weights).sum(0)
    return found.unflatten(1, (size, -1))[:, index]


def check_merge(
    comm: "CudaCommunicator", seed: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    assert comm.dcp is not None
    topology = comm.topology
    index = topology.dcp_rank(topology.tp_rank(comm.rank))
    found = comm.dcp.merge_parts(*parts_of(seed + index, shape, dtype))
    expected = merged(topology.dcp, index, seed, shape, dtype)
    bound = 2.0**-7 if dtype is BF16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=1e-5)


def check_positions_graph(comm: "CudaCommunicator", own: random.Random, first: int, index: int) -> None:
    group, size, shape = comm.dcp, comm.topology.dcp, (3, 2 * comm.topology.dcp, 64)
    assert group is not None
    x = torch.zeros(3, 2, 64, device="cuda")
    found, sums = torch.zeros(shape, device="cuda"), torch.zeros(shape[:2], device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        gathered = group.gather_rows(x)
        own_heads = group.merge_parts(found, sums)
        comm.all_reduce(own_heads)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for replay in range(10):
        seed = 1000 * replay
        x.copy_(numbers(seed + first + index, (3, 2, 64)))
        for to, part in zip((found, sums), parts_of(seed + index, shape, F32), strict=True):
            to.copy_(part)
        own_heads.fill_(float("nan"))
        if replay % 4 == 3:
            dawdle(own)
        graph.replay()
        everyone = torch.stack([numbers(seed + first + r, (3, 2, 64)) for r in range(size)], 1)
        whole = sum(merged(size, place % size, seed, shape, F32) for place in range(comm.topology.tp))
        wrong += (gathered != everyone).sum()
        wrong += (~torch.isclose(own_heads.double(), whole, rtol=1e-5, atol=1e-5)).sum()
    assert wrong.item() == 0


def stages_body(comm: "CudaCommunicator", pipe: Connection) -> int:
    topology, own, alike = comm.topology, random.Random(comm.rank), random.Random(5)
    stage, place = topology.stage(comm.rank), topology.tp_rank(comm.rank)
    shapes = [(alike.randrange(1, 40), alike.choice([576, 1031, 4096])) for _ in range(12)]
    shapes[4] = (1201, 4096)  # three pieces
    kept = []

    def take_tokens(step: int) -> None:
        count = shapes[step][0] % 7 + 1
        kept.append((comm.tokens_from_last_stage(count), numbers(step, count, torch.int64)))

    for step, shape in enumerate(shapes):
        dawdle(own)
        if topology.is_first(comm.rank):
            x = numbers(step * 10 + place, shape, BF16)
        else:
            x = comm.from_previous_stage(shape, BF16)
        x = x + 1
        if topology.is_last(comm.rank):
            expected = numbers(step * 10 + place, shape, BF16)
            for _ in range(topology.pp):
                expected = expected + 1
            kept.append((x, expected))
            comm.tokens_to_first_stage(numbers(step, shape[0] % 7 + 1, torch.int64))
        else:
            comm.to_next_stage(x)
            x.fill_(float("nan"))  # later on the stream, so nobody's loss
        total = numbers(step * 10 + place, 50)
        comm.all_reduce(total)
        kept.append((total, summed(comm, step * 10, 50, F32)))
        if stage == 0 and step >= topology.pp:
            take_tokens(step - topology.pp)
    if stage == 0:
        for step in range(len(shapes) - topology.pp, len(shapes)):
            take_tokens(step)
    torch.cuda.synchronize()
    comm.check()
    assert all(torch.equal(found, expected) for found, expected in kept)
    comm.barrier()
    return comm.buffer_bytes


def endless_body(comm: "CudaCommunicator", pipe: Connection) -> tuple[float, str, int]:
    x = torch.ones(20_000, device="cuda")
    big = torch.ones(3_000_000, device="cuda", dtype=BF16)
    pipe.send(("value", "started"))
    try:
        while True:
            comm.all_reduce(x)
            comm.all_reduce(big)
            torch.cuda.synchronize()
            comm.check()
    except CollectiveError as error:
        return time.monotonic(), error.operation, error.rank


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_a_group_that_shares_a_gpu(tp: int) -> None:
    found = run_all(__name__, "group_body", Topology(tp=tp), 120.0)
    assert set(found) == {found[0]}
    assert 0 < found[0] <= 64 << 20


@pytest.mark.parametrize(("tp", "pp", "dcp"), [(4, 1, 2), (4, 1, 4), (2, 2, 2), (8, 1, 2)])
def test_ranks_that_keep_positions_by_turns(tp: int, pp: int, dcp: int) -> None:
    found = run_all(__name__, "positions_body", Topology(tp=tp, pp=pp, dcp=dcp), 120.0)
    assert set(found) == {found[0]}
    assert 0 < found[0] <= 64 << 20


@pytest.mark.parametrize(("tp", "pp"), [(1, 4), (2, 2)])
def test_stages_hand_on_what_they_made(tp: int, pp: int) -> None:
    run_all(__name__, "stages_body", Topology(tp=tp, pp=pp), 90.0)


def test_a_killed_rank_ends_the_others_within_a_second() -> None:
    torch.empty(1, device="cuda")
    free_before, _ = torch.cuda.mem_get_info()
    with ranks(__name__, "endless_body", Topology(tp=4)) as started:
        for rank in range(4):
            assert started.hear(rank, 90.0) == "started"
        time.sleep(0.7)
        started.kill(1)
        time.sleep(0.3)
        written = time.monotonic()
        write_abort(started.page_fd)
        for rank in (0, 2, 3):
            ended, operation, whose = started.hear(rank, 20.0)
            assert ended - written < 1.0, f"rank {rank} ended after {ended - written:.2f} s"
            assert (operation, whose) == ("all_reduce", rank)
    until = time.monotonic() + 5.0
    while (missing := free_before - torch.cuda.mem_get_info()[0]) > 16 << 20 and time.monotonic() < until:
        time.sleep(0.05)
    assert missing <= 16 << 20, f"{missing >> 20} MiB of device memory are still held"
