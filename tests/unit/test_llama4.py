"""Llama 4 Scout as published, against straight arithmetic; and configurations that cannot be."""

import math
from typing import Any

import pytest

from models.blocks import BlockNeeds, block_bytes
from models.known import known_model
from models.layout import cut_stages, stage_bytes
from models.layouts import Asked, Matrix
from models.llama4 import Llama4Config
from models.machines import parse_gpus
from models.parameter import ParameterSpec
from models.registry import build_spec
from models.spec import ModelSpec
from orchestrator.planner import plan_layouts, subject
from protocol.errors import LayoutError, ModelFormatError, TandemError, UnsupportedModelError
from protocol.topology import Topology

GIB = 1 << 30


def scout(dtype: str = "bfloat16", **changes: Any) -> ModelSpec:
    raw = known_model("llama-4-scout").config
    return build_spec(raw | {"text_config": raw["text_config"] | changes}, "config.json", dtype)


def parameter(model: ModelSpec, name: str) -> ParameterSpec:
    (found,) = [one for one in model.parameters if one.name == name]
    return found


def test_what_is_skipped_of_scout_is_its_vision_tower() -> None:
    width, inner, layers, projected, hidden = 1408, 5632, 34, 4096, 5120
    attention = 4 * (width * width + width)
    mlp = 2 * width * inner + width + inner
    patches = (336 // 14) ** 2 + 1
    ends = 14 * 14 * 3 * width + width + patches * width + 4 * width
    adapter = inner * projected + projected * projected + projected * hidden
    total = ends + layers * (attention + mlp + 4 * width) + adapter
    assert known_model("llama-4-scout").skipped_bytes == 2 * total


def test_three_chunked_groups_and_a_global_one_of_twelve_layers() -> None:
    model = scout()
    full, *chunked = model.kv_groups
    assert (full.kind, full.layers) == ("full", tuple(range(3, 48, 4)))
    assert [(group.kind, group.window, len(group.layers)) for group in chunked] == [
        ("chunked", 8192, 12)
    ] * 3
    assert sorted(layer for group in model.kv_groups for layer in group.layers) == list(range(48))
    # 12 global layers hold 49,152 B of a token, all layers four times that: a block is one group's.
    assert full.bytes_per_token(Topology(), range(48)) == 49_152
    assert block_bytes(model, Topology(), range(48), 64) == 64 * 49_152
    assert block_bytes(model, Topology(8), range(48), 64) == 64 * 49_152 // 8
    config = model.config
    assert isinstance(config, Llama4Config)
    assert config.rope_layers == config.chunked_layers == set(range(48)) - set(full.layers)


def test_fused_experts_are_cut_by_their_inner_features_and_placed_whole() -> None:
    model = scout()
    gate_up, down = (parameter(model, f"layers.7.experts_{which}") for which in ("gate_up", "down"))
    assert gate_up.segments[0].source == "language_model.model.layers.7.feed_forward.experts.gate_up_proj"
    assert gate_up.local_shape(Topology()) == gate_up.segments[0].shape == (16, 5120, 16384)
    assert gate_up.local_shape(Topology(4)) == (16, 5120, 4096)
    assert down.local_shape(Topology(4)) == (16, 2048, 5120)
    assert gate_up.local_shape(Topology(4, ep=4)) == (4, 5120, 16384)
    pieces = [(p.dim, p.start, p.end, p.destination) for p in gate_up.pieces(Topology(4), 1)]
    assert pieces == [(2, 2048, 4096, 0), (2, 8192 + 2048, 8192 + 4096, 2048)]
    assert [(p.dim, p.start, p.end) for p in gate_up.pieces(Topology(), 0)] == [(0, 0, 16)]
    assert [(p.dim, p.start, p.end) for p in gate_up.pieces(Topology(4, ep=4), 1)] == [(0, 4, 8)]
    assert stage_bytes(model, Topology(2), range(48)) / GIB == pytest.approx(100.37, abs=0.01)


@pytest.mark.parametrize("pp", [2, 3, 4, 6, 12])
def test_stages_are_cut_at_periods(pp: int) -> None:
    model = scout()
    stages = cut_stages(model, Topology(1, pp), 140 * GIB)
    assert all(stage.start % 4 == 0 for stage in stages)
    for stage in stages:
        assert block_bytes(model, Topology(), stage, 1) == len(stage) // 4 * 4096


def planned(**asked: Any) -> Matrix:
    found = subject("llama-4-scout", None, "bfloat16", "auto")
    return plan_layouts(found, parse_gpus("2xH200-141GB"), None, Asked(**asked))


def test_scout_on_two_h200() -> None:
    matrix = planned(context=1_000_000)
    best = matrix.layouts[0]
    assert (best.tp, best.pp, best.fits) == (2, 1, True)
    assert 72 * GIB <= 2 * best.kv_bytes_per_rank <= 77 * GIB
    assert best.global_kv_tokens >= 1_500_000
    # Both halves of 49,152 B a token, which global layers alone would take.
    assert best.global_kv_tokens == best.kv_bytes_per_rank // (64 * 24_576) * 64
    # A request of a million tokens in all layers: a chunk, steps in flight and a page in three groups.
    steps = 2 * 8448
    blocks = math.ceil(1_000_000 / 64) + 3 * (math.ceil((8192 + steps) / 64) + 1)
    assert best.requests == best.kv_bytes_per_rank // (64 * 24_576) // blocks == 1
    assert best.kv_tokens == pytest.approx(best.global_kv_tokens * 1_000_000 / (blocks * 64), rel=1e-3)
    assert "by the global layers alone" in matrix.why


def test_short_requests_hold_their_tokens_in_all_layers() -> None:
    best = planned(context=8192).layouts[0]
    assert best.kv_tokens == pytest.approx(best.global_kv_tokens / 4, rel=1e-3)
    assert best.requests == best.kv_tokens // 8192


def test_the_longest_request_is_the_longest_that_fits() -> None:
    needs = BlockNeeds(scout().kv_groups, 64, 4096)
    for blocks in (1, 3, 4, 5, 700, 800, 25_000):
        longest = needs.longest(blocks)
        assert needs.of_request(longest) <= blocks
        assert needs.of_request(longest + 1) > blocks


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"no_rope_layers": [1, 1, 0]}, ModelFormatError, "no_rope_layers says something of 3 layers"),
        ({"layer_types": ["full_attention"]}, ModelFormatError, "layer_types says something of 1 layers"),
        ({"layer_types": ["sliding_attention"] * 48}, UnsupportedModelError, "'sliding_attention'"),
        ({"moe_layers": [48]}, ModelFormatError, "moe_layers has 48, the layers are 0 to 47"),
        ({"attention_chunk_size": None}, ModelFormatError, "attention_chunk_size must be at least 1"),
        ({"attention_chunk_size": 0}, ModelFormatError, "attention_chunk_size must be at least 1"),
        (
            {"interleave_moe_layer_step": 0},
            ModelFormatError,
            "interleave_moe_layer_step must be at least 1",
        ),
        ({"floor_scale": 0}, ModelFormatError, "floor_scale must be at least 1"),
        ({"intermediate_size_mlp": 0}, ModelFormatError, "intermediate_size_mlp must be at least 1"),
        ({"num_experts_per_tok": 17}, ModelFormatError, "cannot choose 17 of 16 experts"),
        ({"attention_bias": True}, UnsupportedModelError, "biases"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, UnsupportedModelError, "rope type 'yarn'"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "packed by 'gptq'"),
        ({"hidden_size": "wide"}, ModelFormatError, "hidden_size"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    changes: dict[str, Any], error: type[TandemError], message: str
) -> None:
    with pytest.raises(error, match=message):
        scout(**changes)


def test_a_text_config_must_be_there() -> None:
    with pytest.raises(ModelFormatError, match="text_config must be an object"):
        build_spec({"architectures": ["Llama4ForConditionalGeneration"]}, "config.json")


def test_degrees_that_do_not_divide_are_refused() -> None:
    with pytest.raises(LayoutError, match="expert parallel 5 cannot divide 16 experts"):
        parameter(scout(), "layers.0.experts_down").local_shape(Topology(5, ep=5))
