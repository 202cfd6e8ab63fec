"""The DeepSeek-V3 family's configurations against straight arithmetic and the published figures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from models.deepseek_config import DeepseekConfig
from models.layout import check_degrees, stage_bytes
from models.registry import load_spec
from models.spec import ModelSpec
from protocol.errors import LayoutError, ModelFormatError, TandemError, UnsupportedModelError
from protocol.topology import Topology

YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
KIMI_TEXT: dict[str, Any] = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 163840,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 50000.0,
    "rope_scaling": YARN,
    "tie_word_embeddings": False,
    "eos_token_id": 163586,
}
DEEPSEEK: dict[str, Any] = KIMI_TEXT | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_attention_heads": 128,
    "vocab_size": 129280,
    "n_routed_experts": 256,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": YARN | {"factor": 40},
}


def spec_of(tmp_path: Path, config: dict[str, Any]) -> ModelSpec:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load_spec(tmp_path, "bfloat16")


def kimi(tmp_path: Path, **changes: Any) -> ModelSpec:
    text = KIMI_TEXT | changes
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": text}
    return spec_of(tmp_path, config)


def deepseek(tmp_path: Path, **changes: Any) -> ModelSpec:
    return spec_of(tmp_path, DEEPSEEK | changes)


def test_a_token_of_kimi_takes_one_latent_a_layer_on_every_rank(tmp_path: Path) -> None:
    model = kimi(tmp_path)
    (group,) = model.kv_groups
    assert group.kind == "latent"
    for tp in (1, 2, 8):
        assert group.bytes_per_token(Topology(tp), range(61)) == 61 * 576 * 2 == 70_272
    assert group.bytes_per_token(Topology(8), range(10, 20)) == 10 * 1152


def test_weights_of_kimi(tmp_path: Path) -> None:
    model = kimi(tmp_path)
    attention = 7168 * 2112 + 1536 * 64 * 192 + 512 * 64 * 256 + 64 * 128 * 7168
    expert = 3 * 7168 * 2048
    moe = 384 * expert + expert + 384 * 7168
    whole = 61 * attention + 60 * moe + 3 * 7168 * 18432 + 2 * 163840 * 7168
    small = 61 * (2 * 7168 + 1536 + 512) + 7168 + 60 * 384 * 2
    assert stage_bytes(model, Topology(), range(61)) == pytest.approx(2 * (whole + small), rel=1e-6)
    assert whole == pytest.approx(1.03e12, rel=0.01)
    # What every rank holds whole of it (FACTS: the projections down to latents, 1.5 GiB more than cut).
    kept = [p for p in model.parameters if p.cut is None and p.name.endswith("down_latents")]
    assert sum(p.local_bytes(Topology(8)) for p in kept) * 7 / 8 == pytest.approx(1.5 * 2**30, rel=0.02)
    active = 61 * attention + 60 * (9 * expert + 384 * 7168) + 3 * 7168 * 18432 + 163840 * 7168
    assert model.flops_per_token == 2 * active
    assert model.experts_per_token == 8


def test_numbers_of_both_models(tmp_path: Path) -> None:
    config = kimi(tmp_path).config
    assert isinstance(config, DeepseekConfig)
    assert config.routing is not None
    assert (config.routing.groups, config.routing.scale, config.routing.scores) == (1, 2.827, "sigmoid")
    assert config.softmax_scale == pytest.approx((0.1 * 4.1588831 + 1) ** 2 / 192**0.5)
    assert config.yarn is not None
    assert config.yarn.rotation_scale == 1.0
    model = deepseek(tmp_path)
    config = model.config
    assert isinstance(config, DeepseekConfig)
    assert config.routing is not None
    assert (config.routing.groups, config.routing.top_groups) == (8, 4)
    assert (config.num_dense_layers, config.rope_theta, model.max_context) == (3, 10000.0, 163840)


def sources(model: ModelSpec) -> set[str]:
    return {segment.source for p in model.parameters for segment in p.segments}


def test_names_are_the_published_ones(tmp_path: Path) -> None:
    found = sources(kimi(tmp_path))
    for name in (
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.mlp.gate_proj.weight",
        "language_model.model.layers.60.self_attn.kv_a_proj_with_mqa.weight",
        "language_model.model.layers.60.mlp.gate.e_score_correction_bias",
        "language_model.model.layers.60.mlp.experts.383.down_proj.weight",
        "language_model.model.layers.60.mlp.shared_experts.up_proj.weight",
    ):
        assert name in found
    model = deepseek(tmp_path)
    assert "model.layers.3.mlp.experts.255.up_proj.weight" in sources(model)


@pytest.mark.parametrize(
    ("make", "name", "is_skipped"),
    [
        (kimi, "vision_tower.encoder.blocks.26.wqkv.bias", True),
        (kimi, "mm_projector.pre_norm.weight", True),
        (kimi, "language_model.model.layers.61.self_attn.q_a_proj.weight", False),
        (deepseek, "vision_tower.encoder.blocks.26.wqkv.bias", False),
        (deepseek, "model.layers.61.self_attn.q_a_proj.weight", True),
        (deepseek, "model.layers.62.self_attn.q_a_proj.weight", False),
        (deepseek, "modelXlayers.61.self_attn.q_a_proj.weight", False),
    ],
)
def test_what_is_known_and_not_needed(tmp_path: Path, make: Any, name: str, is_skipped: bool) -> None:
    assert any(re.fullmatch(pattern, name) for pattern in make(tmp_path).skipped) is is_skipped


def test_heads_decide_the_degrees(tmp_path: Path) -> None:
    model = kimi(tmp_path)
    check_degrees(model, Topology(tp=8, pp=2))
    with pytest.raises(LayoutError) as refusal:
        check_degrees(model, Topology(tp=3))
    assert refusal.value.message.endswith("1, 2, 4, 8, 16, 32, 64")


BAD: list[tuple[dict[str, Any], type[TandemError], str]] = [
    ({"kv_lora_rank": "x"}, ModelFormatError, "config.json"),
    ({"kv_lora_rank": 0}, ModelFormatError, "kv_lora_rank"),
    ({"q_lora_rank": 0}, ModelFormatError, "q_lora_rank"),
    ({"qk_rope_head_dim": 63}, ModelFormatError, "qk_rope_head_dim"),
    ({"num_hidden_layers": 0}, ModelFormatError, "num_hidden_layers"),
    ({"first_k_dense_replace": -1}, ModelFormatError, "first_k_dense_replace"),
    ({"num_nextn_predict_layers": 1 << 40}, ModelFormatError, "num_nextn_predict_layers"),
    ({"num_hidden_layers": 1 << 40}, ModelFormatError, "num_hidden_layers"),
    ({"n_routed_experts": 1 << 40}, ModelFormatError, "n_routed_experts"),
    ({"n_routed_experts": None}, ModelFormatError, "num_experts_per_tok"),
    ({"n_shared_experts": -1}, ModelFormatError, "n_shared_experts"),
    ({"n_group": 7}, ModelFormatError, "n_group"),
    ({"n_group": 8, "topk_group": 9}, ModelFormatError, "n_group"),
    ({"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act"),
    ({"attention_bias": True}, UnsupportedModelError, "attention_bias"),
    ({"rope_interleave": False}, UnsupportedModelError, "rope_interleave"),
    ({"tie_word_embeddings": True}, UnsupportedModelError, "tie_word_embeddings"),
    ({"scoring_func": "softmax"}, UnsupportedModelError, "scoring_func"),
    ({"topk_method": "greedy"}, UnsupportedModelError, "topk_method"),
    ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedModelError, "quantization_config"),
    ({"rope_theta": 1}, ModelFormatError, "rope_theta"),
    ({"rope_scaling": {"type": "spiral"}}, UnsupportedModelError, "rope_scaling"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ModelFormatError, "rope_scaling"),
    ({"rope_scaling": YARN | {"factor": "big"}}, ModelFormatError, "rope_scaling"),
    ({"rope_scaling": YARN | {"factor": 0}}, ModelFormatError, "rope_scaling"),
    ({"rope_scaling": YARN | {"beta_slow": 32}}, ModelFormatError, "rope_scaling"),
    ({"rope_scaling": YARN | {"mscale": -1}}, ModelFormatError, "rope_scaling"),
    ({"rope_scaling": YARN | {"attention_factor": 1.5}}, UnsupportedModelError, "rope_scaling"),
]


@pytest.mark.parametrize(("change", "kind", "field"), BAD)
@pytest.mark.parametrize("make", [kimi, deepseek])
def test_bad_configurations(
    tmp_path: Path, make: Any, change: dict[str, Any], kind: type[TandemError], field: str
) -> None:
    with pytest.raises(kind) as refusal:
        make(tmp_path, **change)
    assert refusal.value.field == field


def test_a_kimi_without_its_text_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="text_config"):
        spec_of(tmp_path, {"architectures": ["KimiK25ForConditionalGeneration"]})
