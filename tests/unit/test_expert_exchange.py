"""Placed experts over ranks that are threads: both forms against one rank that holds them all."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.moe import (
    SPLIT_ABOVE_TOKENS,
    SPLIT_WORTH_BYTES,
    Routing,
    ranks_reached,
    split_bytes,
    splits_tokens,
    whole_bytes,
)
from protocol.topology import Topology
from worker.backends.cpu import CpuBackend
from worker.comm import ThreadCommunicator, thread_group
from worker.layers.mlp import SwiGLU
from worker.layers.moe import MoE
from worker.layers.norm import RMSNorm
from worker.layers.parts import Parts

HIDDEN, WIDTH, SHARED = 12, 6, 8


@dataclass
class Held:
    """Parameters by name, and which experts they are."""

    tensors: dict[str, torch.Tensor]
    local: range

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def matrix(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def spec(self, _name: str) -> SimpleNamespace:
        return SimpleNamespace(layer=0)

    def local_parts(self, _name: str) -> range:
        return self.local


def whole_weights(routing: Routing, draw: torch.Generator, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {
        "norm": (HIDDEN,),
        "router": (routing.experts, HIDDEN),
        "experts_gate_up": (routing.experts, 2 * WIDTH, HIDDEN),
        "experts_down": (routing.experts, HIDDEN, WIDTH),
        "shared_gate_up": (2 * SHARED, HIDDEN),
        "shared_down": (HIDDEN, SHARED),
    }
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def of_rank(whole: dict[str, torch.Tensor], topology: Topology, rank: int) -> Held:
    each = whole["router"].shape[0] // topology.tp
    local = range(rank * each, (rank + 1) * each)
    part = slice(rank * SHARED // topology.tp, (rank + 1) * SHARED // topology.tp)
    gate, up = whole["shared_gate_up"].chunk(2)
    own = {name: whole[name][local.start : local.stop] for name in ("experts_gate_up", "experts_down")}
    own["shared_gate_up"] = torch.cat([gate[part], up[part]])
    own["shared_down"] = whole["shared_down"][:, part].contiguous()
    return Held(whole | own, local)


def over_ranks(tp: int, work: Callable[[ThreadCommunicator], torch.Tensor]) -> list[torch.Tensor]:
    found: list[torch.Tensor | BaseException] = [torch.empty(0)] * tp

    def run(comm: ThreadCommunicator) -> None:
        try:
            with torch.inference_mode():
                found[comm.rank] = work(comm)
        except BaseException as error:
            found[comm.rank] = error
            comm.abort()

    threads = [threading.Thread(target=run, args=(c,)) for c in thread_group(Topology(tp, ep=tp), 20.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return cast("list[torch.Tensor]", found)


def block(held: Held, comm: Any, routing: Routing, *, has_shared: bool) -> tuple[MoE, RMSNorm]:
    parts = Parts(cast("Any", held), cast("Any", None), CpuBackend(1024), comm)
    shared = SwiGLU(parts, "shared_") if has_shared else None
    return MoE(parts, "", routing, shared), RMSNorm(parts, "norm", 1e-6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tp=st.sampled_from([2, 4]),
    each=st.integers(1, 3),
    top_k=st.integers(1, 4),
    tokens=st.integers(1, 45),
    chunk=st.sampled_from([1, 4, 16, 1024]),
    has_shared=st.booleans(),
    is_split=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_ranks_add_up_to_one_that_holds_all(
    tp: int,
    each: int,
    top_k: int,
    tokens: int,
    chunk: int,
    has_shared: bool,
    is_split: bool,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    routing = Routing(experts=tp * each, top_k=min(top_k, tp * each), normalize=True)
    whole = whole_weights(routing, draw, torch.float32)
    residual = torch.randn(tokens, HIDDEN, generator=draw)
    updates = [torch.randn(tokens, HIDDEN, generator=draw) for _ in range(tp)]

    (alone,) = thread_group(Topology())
    moe, norm = block(Held(whole, range(routing.experts)), alone, routing, has_shared=has_shared)
    expected = residual + torch.stack(updates).sum(0)
    expected += moe(norm(expected))

    def work(comm: ThreadCommunicator) -> torch.Tensor:
        moe, norm = block(of_rank(whole, comm.topology, comm.rank), comm, routing, has_shared=has_shared)
        mine = residual.clone()
        left = moe.after(mine, updates[comm.rank].clone(), norm)
        assert (left is None) == is_split
        loads[comm.rank] = moe.counted.read()
        if left is not None:
            comm.all_reduce(left)
            mine += left
        return mine

    loads: dict[int, list[int]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.layers.moe.splits_tokens", lambda *_, **__: is_split)
        for module in ("moe", "expert_exchange"):
            patch.setattr(f"worker.layers.{module}.CHUNK_TOKENS", chunk)
        found = over_ranks(tp, work)
    # Every choice is counted by one rank, and as one rank alone counts it.
    assert [count for rank in range(tp) for count in loads[rank]] == moe.counted.read()
    assert sum(moe.counted.read()) == tokens * routing.top_k
    for one in found:
        assert torch.equal(one, found[0])
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_all_tokens_may_go_to_one_rank() -> None:
    draw = torch.Generator().manual_seed(0)
    routing = Routing(experts=8, top_k=1)
    whole = whole_weights(routing, draw, torch.float32)
    residual = torch.randn(1, HIDDEN, generator=draw).repeat(50, 1)
    (alone,) = thread_group(Topology())
    moe, norm = block(Held(whole, range(8)), alone, routing, has_shared=False)
    expected = residual + moe(norm(residual))

    def work(comm: ThreadCommunicator) -> torch.Tensor:
        moe, norm = block(of_rank(whole, comm.topology, comm.rank), comm, routing, has_shared=False)
        mine = residual.clone()
        assert moe.after(mine, torch.zeros_like(mine), norm) is None
        return mine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.layers.moe.splits_tokens", lambda *_, **__: True)
        for one in over_ranks(4, work):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


def test_how_many_ranks_a_token_reaches() -> None:
    draw = torch.Generator().manual_seed(0)
    for experts, top_k, ranks in ((16, 4, 4), (8, 1, 8), (24, 8, 2)):
        chosen = torch.rand(20_000, experts, generator=draw).topk(top_k, -1).indices
        reached = torch.zeros(20_000, ranks).scatter_(1, chosen // (experts // ranks), 1.0)
        counted = float(reached[:, 1:].sum(1).mean())
        assert ranks_reached(Routing(experts, top_k), ranks) == pytest.approx(counted, rel=0.02)


def test_tokens_are_split_where_it_spares_more_than_its_messages_cost() -> None:
    qwen, eight = Routing(128, 8), Topology(8, ep=8)
    assert whole_bytes(4096, 8) == 4 * 7 / 8 * 4096
    spared = whole_bytes(4096, 8) - split_bytes(qwen, 4096, 8, has_shared=False)
    assert 0 < spared < 4096
    least = -int(-SPLIT_WORTH_BYTES // spared)
    assert least > SPLIT_ABOVE_TOKENS
    assert splits_tokens(qwen, least, 4096, eight, has_shared=False)
    assert not splits_tokens(qwen, least - 1, 4096, eight, has_shared=False)
    assert not splits_tokens(qwen, 8448, 4096, Topology(8), has_shared=False)
    assert not splits_tokens(qwen, SPLIT_ABOVE_TOKENS, 1 << 30, eight, has_shared=False)
    # What shared experts need of all ranks costs more than the exchange spares.
    assert not splits_tokens(Routing(384, 8), 8448, 2 * 7168, eight, has_shared=True)
