"""What a rank reads and multiplies, held against the planner's arithmetic and counts by hand."""

import pytest
import torch

from benchmarks.random_weights import draw
from benchmarks.rank_work import RankWork
from models.known import known_model
from models.layout import arena
from models.machines import parse_gpus
from models.memory import CUDA_OVERHEADS, StepLimits, divide_memory
from models.registry import build_spec
from models.spec import ModelSpec
from models.speed import Pace
from protocol.topology import Topology

LIMITS = StepLimits(max_rows=256, step_tokens=8448, logit_rows=256, block_tokens=64)
LAYOUTS = [
    ("kimi-k2.5", Topology(8)),
    ("kimi-k2.5", Topology(8, ep=8)),
    ("deepseek-v3", Topology(8)),
    ("qwen3-30b-a3b", Topology(1)),
    ("llama-4-scout", Topology(2)),
    ("llama-3-8b", Topology(1)),
]


def _spec(name: str) -> ModelSpec:
    known = known_model(name)
    return build_spec(known.config, known.source, "bfloat16")


def _pace(spec: ModelSpec, topology: Topology) -> Pace:
    budgets = [200 << 30] * topology.tp
    ranks = divide_memory(spec, topology, budgets, LIMITS, CUDA_OVERHEADS)
    return Pace(spec, topology, ranks, parse_gpus("8xH200"), LIMITS.step_tokens)


@pytest.mark.parametrize(("name", "topology"), LAYOUTS)
def test_everything_but_the_embedding_is_read_where_all_experts_are_hit(
    name: str, topology: Topology
) -> None:
    spec = _spec(name)
    work, held = RankWork(spec, topology), arena(spec, topology, (range(spec.num_layers),), 0)
    (embedding,) = (p.local_bytes(topology) for p in spec.parameters if p.place == "first")
    every = work.expected_hit(10**6)
    # What is between parameters is less than an alignment each.
    between = held.size - embedding - work.weight_bytes(every)
    assert 0 <= between < 512 * len(held.placed)


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize(("name", "topology"), [one for one in LAYOUTS if one[1].ep == 1])
def test_bytes_of_a_step_are_those_that_the_planner_counts(
    name: str, topology: Topology, rows: int
) -> None:
    spec = _spec(name)
    work, decode = RankWork(spec, topology), _pace(spec, topology).decode(rows, 1024)
    assert work.weight_bytes(work.expected_hit(rows)) == pytest.approx(decode.weight_bytes, rel=1e-6)
    assert work.kv_bytes(rows, 1024) == pytest.approx(decode.kv_bytes, rel=1e-6)


def test_placed_and_cut_experts_are_read_alike_where_tokens_choose_evenly() -> None:
    spec = _spec("kimi-k2.5")
    cut, placed = RankWork(spec, Topology(8)), RankWork(spec, Topology(8, ep=8))
    assert cut.weight_bytes(cut.expected_hit(16)) == pytest.approx(
        placed.weight_bytes(placed.expected_hit(16))
    )
    # One expert whole is eight of an eighth.
    assert placed.expert_bytes[1] == 8 * cut.expert_bytes[1] == 3 * 7168 * 2048 * 9 // 16


@pytest.mark.parametrize(("name", "topology"), LAYOUTS)
def test_operations_of_a_prompt_are_nearly_the_models(name: str, topology: Topology) -> None:
    spec, tokens = _spec(name), 512
    work = RankWork(spec, topology)
    layers = work.expert_bytes
    choices = dict.fromkeys(layers, tokens * spec.experts_per_token / topology.ep)
    found = work.prompt_flops(tokens, choices) * topology.tp
    head = 2.0 * spec.vocab_size * spec.hidden_size
    scores = sum(
        len(g.layers) * 2.0 * (g.computed_dims or g.key_dim + g.value_dim) * tokens**2 / 2 * spec.heads
        for g in spec.kv_groups
    )
    model = tokens * (spec.flops_per_token - head) + scores
    # The last layer is left out; and what ranks hold whole, each of them computes.
    whole = (
        2.0
        * tokens
        * (topology.tp - 1)
        * sum(
            p.segments[0].shape[-1] * sum(s.shape[0] for s in p.segments)
            for p in spec.parameters
            if p.cut is None and len(p.segments[0].shape) == 2 and p.scales_of is None
        )
    )
    assert found <= (model + whole) * 1.01
    assert found >= (model + whole) * (1 - 1.5 / spec.num_layers) * 0.99


def test_attention_of_a_chunked_layer_counts_pairs_within_chunks() -> None:
    spec = _spec("llama-4-scout")
    work = RankWork(spec, Topology(1))
    window = next(g.window for g in spec.kv_groups if g.kind == "chunked")
    tokens = 20_000
    none = work.prompt_flops(tokens, {}) - 2 * tokens * work._adds
    pairs = {
        "chunked": sum(p % window + 1 for p in range(tokens)),
        "full": sum(p + 1 for p in range(tokens)),
    }
    last = spec.num_layers - 1
    by_hand = sum(
        2
        * (g.key_dim + g.value_dim)
        * spec.heads
        * pairs[g.kind]
        * sum(layer != last for layer in g.layers)
        for g in spec.kv_groups
    )
    assert none == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["kimi-k2.5", "deepseek-v3", "qwen3-30b-a3b"])
def test_drawn_parameters_are_finite_and_small(name: str) -> None:
    spec, generator = _spec(name), torch.Generator().manual_seed(0)
    layer = spec.layer_parameters(spec.num_layers - 1)
    for parameter in (*layer, *(p for p in spec.parameters if p.place != "layer")):
        shape = [min(extent, 64) for extent in parameter.local_shape(Topology(1))]
        out = torch.full(shape, 77, dtype=torch.int32).to(getattr(torch, parameter.dtype))
        draw(parameter, out, generator)
        values = out.float()
        assert values.isfinite().all()
        if parameter.dtype == "int32":
            assert values.abs().max() > 1 << 30
        else:
            assert values.abs().max() < 6
