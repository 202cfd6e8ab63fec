"""Views of a group (experts placed, positions kept apart) in the matrix of layouts, held to arithmetic."""

import math
import time
from typing import Any

import pytest

from models.known import known_model
from models.layouts import Asked, Layout, Matrix, lay_out
from models.machines import Gpu, Link, Machines, parse_gpus
from models.memory import CUDA_OVERHEADS, DeviceOverheads, StepLimits
from models.moe import Routing, split_bytes
from models.registry import build_spec
from models.spec import ModelSpec
from orchestrator.config import GPU_DEFAULTS
from protocol.errors import LayoutError

GIB = 1 << 30
LINK = Link("wire", 1e6, 1e-3)
GPU = Gpu("toy", GIB, 1e9, 1e9, LINK, 1e6)
NONE = DeviceOverheads(0, 0, 0, 0, 0, 0)
LIMITS = StepLimits(max_rows=4, step_tokens=16, logit_rows=4, block_tokens=16)
HEADS, DIM, HIDDEN, INNER, LAYERS = 4, 16, 64, 32, 2
EXPERT = 3 * HIDDEN * INNER * 2

KIMI: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 1,
    "intermediate_size": 18432,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50000.0,
    "vocab_size": 163840,
    "max_position_embeddings": 262144,
}


def mixture(kv_heads: int = 1, experts: int = 8) -> ModelSpec:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": DIM,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INNER,
        "vocab_size": 256,
        "max_position_embeddings": 512,
    }
    return build_spec(config, "config.json", "bfloat16")


def matrix(model: ModelSpec, count: int = 4, budget: int = GIB, **asked: Any) -> Matrix:
    return lay_out(model, Machines(GPU, 1, count, LINK), budget, LIMITS, NONE, Asked(**asked), 10**6)


def only(model: ModelSpec, **asked: Any) -> Layout:
    (layout,) = matrix(model, **asked).layouts
    return layout


def degrees(found: Matrix) -> set[tuple[int, int, int, int]]:
    return {(layout.tp, layout.pp, layout.ep, layout.dcp) for layout in found.layouts}


def test_all_views_that_the_model_allows_are_planned() -> None:
    two_stages = {(2, 2, ep, dcp) for ep in (1, 2) for dcp in (1, 2)}
    whole = {(4, 1, ep, dcp) for ep in (1, 4) for dcp in (1, 2, 4)}
    assert degrees(matrix(mixture(), pp=1)) == whole
    assert degrees(matrix(mixture(), pp=2)) == two_stages
    assert degrees(matrix(mixture(kv_heads=2), pp=1)) == {x for x in whole if x[3] < 4}
    assert degrees(matrix(mixture(experts=6), pp=1)) == {x for x in whole if x[2] == 1}
    assert degrees(matrix(mixture(), tp=4, ep=4)) == {x for x in whole if x[2] == 4}
    assert degrees(matrix(mixture(), dcp=4)) == {x for x in whole if x[3] == 4}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"ep": 3}, "ep 3 is neither 1 nor tp"),
        ({"tp": 4, "ep": 2}, "ep 2 is neither 1 nor tp 4"),
        ({"tp": 4, "dcp": 3}, "dcp 3 does not divide tp 4; degrees that do: 1, 2, 4"),
        ({"tp": 4, "ep": 4}, "4 cannot divide 6 experts; degrees that do: 1, 2, 3, 6"),
        ({"tp": 4, "dcp": 4}, "each of the 2 KV heads of .* is on 2 ranks; degrees that do: 1, 2$"),
    ],
)
def test_views_that_cannot_be_say_what_would_do(asked: dict[str, int], told: str) -> None:
    with pytest.raises(LayoutError, match=told) as refused:
        matrix(mixture(kv_heads=2, experts=6), **asked)
    assert refused.value.field == ("dcp" if "dcp" in asked else "ep")


def test_a_model_without_experts_has_none_to_place() -> None:
    dense = build_spec(known_model("llama-3-8b").config, "config.json", "bfloat16")
    with pytest.raises(LayoutError, match="no routed experts: give ep 1"):
        matrix(dense, tp=4, ep=4)


def test_what_placed_experts_read_is_what_the_rank_with_most_reads() -> None:
    cut, placed = only(mixture(), tp=4, ep=1, dcp=1), only(mixture(), tp=4, ep=4, dcp=1)
    assert cut.weights_bytes_per_rank == placed.weights_bytes_per_rank
    assert cut.traffic == placed.traffic
    always = cut.decode_one.weight_bytes - round(LAYERS * EXPERT * 2 / 4)
    # Two of eight are hit, among four ranks with two each: rather more than half an expert, at most two.
    held, part = 2 * LAYERS * EXPERT, 2 / 8
    most = 2 * part + math.sqrt(2 * math.log(4) * 2 * part * (1 - part))
    assert placed.decode_one.weight_bytes == always + round(held * most / 2)
    assert 2 * part < most < 2
    many = only(mixture(), tp=4, ep=4, dcp=1, concurrency=10**6).decode_many
    assert many.weight_bytes == pytest.approx(always + held, rel=1e-3)


def test_messages_of_positions_kept_apart_by_hand() -> None:
    whole, apart = only(mixture(), tp=4, ep=1, dcp=1), only(mixture(), tp=4, ep=1, dcp=4)
    by_name = {message.what: message for message in apart.traffic}
    queries, outputs = by_name["gather of queries"], by_name["reduce-scatter of outputs"]
    assert (queries.count, queries.bytes_per_token) == (LAYERS, LAYERS * 3 * DIM * 2)
    assert (outputs.count, outputs.bytes_per_token) == (LAYERS, LAYERS * 3 * (DIM * 2 + 4))
    assert {message.what for message in whole.traffic} == {"all-reduce", "gather to sample"}
    assert apart.decode_one.kv_bytes == whole.decode_one.kv_bytes // 4
    less = (whole.decode_one.kv_bytes - apart.decode_one.kv_bytes) / 1e9
    more = 2 * LAYERS * 1e-3 + (queries.bytes_per_token + outputs.bytes_per_token) / 1e6
    assert apart.decode_one.token_s == pytest.approx(whole.decode_one.token_s + more - less)
    # A chunk of a prompt gathers what others keep of those before it: of 32 chunks of 16, 248 on average.
    line = LAYERS * 2 * DIM * 2
    gathered = LAYERS * 1e-3 + 248 * line * 3 / 4 / 1e6
    assert apart.first_token_s == pytest.approx(whole.first_token_s + 32 * gathered)


def known(config: dict[str, Any], gpus: str, asked: Asked, step_tokens: int | None = None) -> Matrix:
    names = ("max_rows", "step_tokens", "logit_rows", "block_tokens")
    limits = StepLimits(*(GPU_DEFAULTS[name] for name in names))
    if step_tokens is not None:
        limits = StepLimits(limits.max_rows, step_tokens, limits.logit_rows, limits.block_tokens)
    machines = parse_gpus(gpus)
    model = build_spec(config, "config.json", "bfloat16")
    return lay_out(model, machines, 79 * GIB, limits, CUDA_OVERHEADS, asked, 10**11)


def test_large_steps_deal_tokens_out_where_that_spares_bytes() -> None:
    qwen = known_model("qwen3-30b-a3b").config
    asked = Asked(tp=8, ep=8, dcp=1)
    (large,), (small,) = (known(qwen, "8xH100", asked, n).layouts for n in (8448, 2048))
    (cut,) = known(qwen, "8xH100", Asked(tp=8, ep=1, dcp=1), 8448).layouts
    (dealt,) = [m for m in large.traffic if m.what == "tokens to experts and back"]
    each = split_bytes(Routing(128, 8), 2 * 2048, 8, has_shared=False)
    assert (dealt.count, dealt.bytes_per_token) == (48 * 5, round(48 * each))
    assert small.traffic == cut.traffic
    assert large.first_token_s < small.first_token_s


def test_more_kv_by_positions_kept_apart_is_taken_and_said() -> None:
    found = known(known_model("llama-3.3-70b").config, "16xH100", Asked(tp=16))
    best = found.layouts[0]
    alone = next(layout for layout in found.layouts if layout.dcp == 1)
    assert (best.dcp, best.ep) == (2, 1)
    assert best.kv_tokens > 1.9 * alone.kv_tokens
    assert found.why.startswith("tp 16 pp 1 dcp 2: ")
    assert f"; tp 16 pp 1 alone holds {alone.kv_tokens:,}, and a token at 1 request takes " in found.why
    assert alone.decode_one.token_s < best.decode_one.token_s


@pytest.mark.parametrize("gpus", ["8xH200", "2x8xH200"])
def test_384_experts_in_61_layers_are_planned_quickly(gpus: str) -> None:
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        found = known(KIMI, gpus, Asked())
        seconds.append(time.monotonic() - started)
    assert len(found.layouts) > 15
    # A whole command has a second; this is its largest part.
    assert min(seconds) < 0.6
