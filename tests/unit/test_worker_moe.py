"""Routing and experts against a naive twin: one token, one choice, one product at a time."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from models.moe import CHUNK_TOKENS, Routing, expert_chunks
from protocol.errors import ModelFormatError
from protocol.topology import Topology
from worker.backends.base import ExpertWeights
from worker.backends.cpu import CpuBackend
from worker.backends.cpu_moe import route

HIDDEN, WIDTH = 12, 5

routings = st.builds(
    dict,
    groups=st.sampled_from([1, 2, 4]),
    size=st.integers(2, 5),
    top_k=st.integers(1, 8),
    top_groups=st.integers(1, 4),
    scores=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    has_bias=st.booleans(),
    weighs=st.sampled_from(["output", "input"]),
)


def routing_of(case: dict[str, Any]) -> Routing:
    experts, top_groups = case["groups"] * case["size"], min(case["top_groups"], case["groups"])
    return Routing(
        experts=experts,
        top_k=min(case["top_k"], case["size"] * top_groups),
        groups=case["groups"],
        top_groups=top_groups,
        **{name: case[name] for name in ("scores", "normalize", "scale", "has_bias", "weighs")},
    )


def weights_of(routing: Routing, draw: torch.Generator) -> ExpertWeights:
    return ExpertWeights(
        router=torch.randn(routing.experts, HIDDEN, generator=draw),
        bias=torch.randn(routing.experts, generator=draw) if routing.has_bias else None,
        gate_up=torch.randn(routing.experts, 2 * WIDTH, HIDDEN, generator=draw),
        down=torch.randn(routing.experts, HIDDEN, WIDTH, generator=draw),
    )


def naive_choice(routing: Routing, logits: list[float], bias: list[float] | None) -> dict[int, float]:
    """Return the weight of each expert that one token chooses, by sorting."""
    scores = torch.tensor(logits)
    scores = scores.softmax(0) if routing.scores == "softmax" else scores.sigmoid()
    corrected = [float(s) + (bias[e] if bias else 0.0) for e, s in enumerate(scores)]
    size = routing.experts // routing.groups
    parts = [range(g * size, (g + 1) * size) for g in range(routing.groups)]
    parts.sort(key=lambda part: -sum(sorted(corrected[e] for e in part)[-2:]))
    allowed = [e for part in parts[: routing.top_groups] for e in part]
    chosen = sorted(allowed, key=lambda e: -corrected[e])[: routing.top_k]
    total = sum(float(scores[e]) for e in chosen) if routing.normalize else 1.0
    return {e: float(scores[e]) / total * routing.scale for e in chosen}


def naive(x: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
    out = torch.zeros_like(x)
    bias = weights.bias.tolist() if weights.bias is not None else None
    for token, vector in enumerate(x):
        choice = naive_choice(routing, (weights.router @ vector).tolist(), bias)
        for expert, weight in choice.items():
            given_ = vector * weight if routing.weighs == "input" else vector
            gate, up = (weights.gate_up[expert] @ given_).chunk(2)
            value = weights.down[expert] @ (functional.silu(gate) * up)
            out[token] += value if routing.weighs == "input" else value * weight
    return out


@settings(max_examples=80, deadline=None)
@given(case=routings, tokens=st.integers(0, 40), seed=st.integers(0, 1000))
def test_experts_equal_their_naive_twin(case: dict[str, Any], tokens: int, seed: int) -> None:
    routing, draw = routing_of(case), torch.Generator().manual_seed(seed)
    weights = weights_of(routing, draw)
    x = torch.randn(tokens, HIDDEN, generator=draw)
    experts = CpuBackend(1024).experts(weights, routing)
    routed = experts.route(x)
    assert routed.experts.shape == routed.weights.shape == (tokens, routing.top_k)
    assert all(len(set(chosen)) == routing.top_k for chosen in routed.experts.tolist())
    torch.testing.assert_close(experts.run(x, routed), naive(x, weights, routing), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(case=routings, tokens=st.integers(0, 40), seed=st.integers(0, 1000), data=st.data())
def test_parts_of_placed_experts_add_up(
    case: dict[str, Any], tokens: int, seed: int, data: st.DataObject
) -> None:
    routing, draw = routing_of(case), torch.Generator().manual_seed(seed)
    weights = weights_of(routing, draw)
    x = torch.randn(tokens, HIDDEN, generator=draw)
    sizes = [d for d in range(1, routing.experts + 1) if routing.experts % d == 0]
    size = data.draw(st.sampled_from(sizes))
    total = torch.zeros_like(x)
    for first in range(0, routing.experts, size):
        own = slice(first, first + size)
        local = replace(weights, gate_up=weights.gate_up[own], down=weights.down[own], first=first)
        experts = CpuBackend(1024).experts(local, routing)
        total += experts.run(x, experts.route(x))
    torch.testing.assert_close(total, naive(x, weights, routing), rtol=1e-4, atol=1e-4)


def test_a_bias_moves_the_choice_and_not_the_weight() -> None:
    routing = Routing(experts=4, top_k=1, scores="sigmoid", has_bias=True)
    routed = route(torch.tensor([[3.0, 0.0, 0.0, 0.0]]), routing, torch.tensor([0.0, 0.0, 9.0, 0.0]))
    assert routed.experts.tolist() == [[2]]
    assert routed.weights.tolist() == [[0.5]]


def test_scores_that_vanish_give_no_nan() -> None:
    routing = Routing(experts=4, top_k=2, scores="sigmoid", normalize=True)
    assert route(torch.full((1, 4), -1e4), routing, None).weights.tolist() == [[0.0, 0.0]]


def test_all_tokens_may_choose_one_expert() -> None:
    routing = Routing(experts=64, top_k=1)
    draw = torch.Generator().manual_seed(0)
    weights = weights_of(routing, draw)
    x = torch.randn(1, HIDDEN, generator=draw).expand(300, HIDDEN)
    experts = CpuBackend(1024).experts(weights, routing)
    torch.testing.assert_close(
        experts.run(x, experts.route(x)), naive(x[:1], weights, routing).expand(300, HIDDEN)
    )


BAD: list[tuple[dict[str, Any], str]] = [
    ({"experts": 0, "top_k": 1}, "num_experts_per_tok"),
    ({"experts": 4, "top_k": 5}, "num_experts_per_tok"),
    ({"experts": 4, "top_k": 0}, "num_experts_per_tok"),
    ({"experts": 6, "top_k": 1, "groups": 4}, "n_group"),
    ({"experts": 6, "top_k": 1, "groups": 2, "top_groups": 3}, "n_group"),
    ({"experts": 4, "top_k": 1, "groups": 4, "top_groups": 2}, "n_group"),
    ({"experts": 8, "top_k": 5, "groups": 4, "top_groups": 2}, "topk_group"),
]


@pytest.mark.parametrize(("fields", "field"), BAD)
def test_a_routing_that_nobody_could_follow(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelFormatError) as refusal:
        Routing(**fields)
    assert refusal.value.field == field


def test_what_a_chunk_holds_stops_growing_with_the_step() -> None:
    chunks = expert_chunks(Routing(experts=8, top_k=2), hidden=10, intermediate=7)
    assert chunks.elements(1, Topology()) == 3 * 2 * 10 + 2 * 3 * 7
    assert chunks.elements(100, Topology(2)) == 100 * (60 + 21)
    assert chunks.elements(8192, Topology(4)) == chunks.elements(CHUNK_TOKENS, Topology(4))
    assert chunks.elements(8192, Topology(4)) == CHUNK_TOKENS * (60 + 11)
    # All of a chunk's choices may be those of one rank's experts, and come to it in messages.
    assert chunks.elements(8192, Topology(4, ep=4)) == CHUNK_TOKENS * (60 + 42 + 4 * 10)
