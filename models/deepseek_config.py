"""What config.json says of a model of the DeepSeek-V3 family, typed and checked.

Source: transformers' ``DeepseekV3Config`` (field names), the published checkpoints' files.
"""

import math
from typing import Any

import msgspec

from models.moe import Routing
from models.yarn import Yarn, yarn_of
from protocol.errors import ModelFormatError, UnsupportedModelError

LATENT_NORM_EPS = 1e-6
"""Of the norms of latents, whatever ``rms_norm_eps`` says of the others: so the published code has it."""
_MOST = 1 << 12
"""Layers or experts that a configuration may count without being a mistake."""


class DeepseekConfig(msgspec.Struct, frozen=True):
    """What the forward pass needs to know."""

    hidden_size: int
    intermediate_size: int
    """Of a dense layer's block."""
    expert_size: int
    """Inner features of one routed expert."""
    shared_size: int
    """Inner features of the experts that all tokens share, together."""
    num_layers: int
    num_dense_layers: int
    """How many of the layers, from the first one on, have no experts."""
    heads: int
    q_latent: int | None
    """None: queries are projected from the hidden state at once."""
    kv_latent: int
    nope_dim: int
    """Features of a head's query and key that are not rotated."""
    rope_dim: int
    value_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    routing: Routing | None
    """None where all layers are dense."""

    @property
    def line_dim(self) -> int:
        """Elements of a token's line in the cache."""
        return self.kv_latent + self.rope_dim

    @property
    def softmax_scale(self) -> float:
        """What a query's products with keys are multiplied with."""
        stretched = 1.0 if self.yarn is None else self.yarn.softmax_scale
        return stretched / math.sqrt(self.nope_dim + self.rope_dim)


class Json(msgspec.Struct):
    """The fields of config.json (or its text_config) that are read; others are not our business."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    moe_intermediate_size: int = 0
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    num_nextn_predict_layers: int = 0
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    rope_interleave: bool = True
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    quantization_config: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None


def config_of(text: Any, place: str) -> tuple[DeepseekConfig, Json]:
    """Return what the text model's part of config.json says; ``place`` names it in messages.

    Errors: ``ModelFormatError`` for a malformed one, ``UnsupportedModelError`` for what we lack.
    """
    try:
        json = msgspec.convert(text, Json)
    except msgspec.ValidationError as error:
        raise ModelFormatError(f"{place}: {error}", field="config.json") from None
    _refuse_unserved(json)
    return _config(json), json


def _refuse_unserved(json: Json) -> None:
    expected: dict[str, object] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_interleave": True,
        "tie_word_embeddings": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }
    for name, value in expected.items():
        found = getattr(json, name)
        if found != value:
            raise UnsupportedModelError(
                f"{name} {found!r} is not served for the DeepSeek-V3 family, {value!r} is", field=name
            )


def _config(json: Json) -> DeepseekConfig:
    dense = min(json.first_k_dense_replace, json.num_hidden_layers)
    names = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "v_head_dim",
        "max_position_embeddings",
    ]
    if json.q_lora_rank is not None:
        names.append("q_lora_rank")
    if dense < json.num_hidden_layers:
        names += ["moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group"]
    for name in names:
        if getattr(json, name) < 1:
            raise ModelFormatError(
                f"config.json: {name} must be at least 1, not {getattr(json, name)}", field=name
            )
    counts = ("num_hidden_layers", "first_k_dense_replace", "num_nextn_predict_layers")
    for name in (*counts, "n_routed_experts", "n_shared_experts"):
        if not 0 <= (getattr(json, name) or 0) <= _MOST:
            raise ModelFormatError(
                f"config.json: {name} must be from 0 to {_MOST}, not {getattr(json, name)}", field=name
            )
    if json.qk_rope_head_dim < 2 or json.qk_rope_head_dim % 2:
        raise ModelFormatError(
            f"config.json: qk_rope_head_dim {json.qk_rope_head_dim} must be even", field="qk_rope_head_dim"
        )
    rope = json.rope_parameters or json.rope_scaling or {}
    theta = rope.get("rope_theta", json.rope_theta if json.rope_theta is not None else 10000.0)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < math.inf:
        raise ModelFormatError(
            f"config.json: rope_theta must be a number above 1, not {theta!r}", field="rope_theta"
        )
    has_experts = dense < json.num_hidden_layers
    return DeepseekConfig(
        hidden_size=json.hidden_size,
        intermediate_size=json.intermediate_size,
        expert_size=json.moe_intermediate_size if has_experts else 0,
        shared_size=json.moe_intermediate_size * (json.n_shared_experts or 0) if has_experts else 0,
        num_layers=json.num_hidden_layers,
        num_dense_layers=dense,
        heads=json.num_attention_heads,
        q_latent=json.q_lora_rank,
        kv_latent=json.kv_lora_rank,
        nope_dim=json.qk_nope_head_dim,
        rope_dim=json.qk_rope_head_dim,
        value_dim=json.v_head_dim,
        vocab_size=json.vocab_size,
        norm_eps=json.rms_norm_eps,
        rope_theta=float(theta),
        yarn=yarn_of(rope),
        routing=_routing(json) if has_experts else None,
    )


def _routing(json: Json) -> Routing:
    return Routing(
        experts=json.n_routed_experts or 0,
        top_k=json.num_experts_per_tok,
        scores="sigmoid",
        normalize=json.norm_topk_prob,
        scale=json.routed_scaling_factor,
        groups=json.n_group,
        top_groups=json.topk_group,
        has_bias=True,
    )
