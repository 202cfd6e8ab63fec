"""Qwen3 with a mixture of experts in most layers, or in all.

Source: transformers' ``Qwen3MoeConfig`` (field names and defaults) and the published checkpoints' names.
"""

from typing import Any

import msgspec

from models.decoder import (
    DecoderConfig,
    DecoderJson,
    attention_parameters,
    config_of,
    decoder_spec,
    dense_parameters,
    read_json,
)
from models.moe import Routing, expert_chunks, expert_parameters
from models.parameter import ParameterSpec
from models.spec import ModelSpec
from protocol.errors import ModelFormatError

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


class Qwen3MoeConfig(DecoderConfig, frozen=True):
    """What the forward pass needs to know."""

    routing: Routing
    expert_size: int
    """Inner features of one expert."""
    sparse_layers: frozenset[int]
    """Layers whose feed-forward block is a mixture of experts."""


class _Json(DecoderJson, kw_only=True):
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    num_experts: int | None = None
    num_local_experts: int | None = None
    """What newer files call ``num_experts``."""
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None


def spec(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """Return the model that a ``config.json`` describes, computed in ``dtype``.

    Errors: ``ModelFormatError`` for a malformed one, ``UnsupportedModelError`` for what we lack.
    """
    json = read_json(raw, _Json)
    config = _config(json)
    h, routing, size = config.hidden_size, config.routing, config.expert_size

    def layer(index: int) -> tuple[ParameterSpec, ...]:
        attention = attention_parameters(config, index, dtype, head_norms=True)
        if index not in config.sparse_layers:
            return attention + dense_parameters(config, index, dtype)
        source = f"model.layers.{index}.mlp."
        return attention + expert_parameters(index, source, routing, h, size, dtype)

    num_sparse = len(config.sparse_layers)
    return decoder_spec(
        "qwen3_moe",
        config,
        json,
        dtype,
        layer,
        num_dense=config.num_layers - num_sparse,
        other_flops=2 * num_sparse * h * (routing.experts + 3 * routing.top_k * size),
        chunks=expert_chunks(routing, h, size) if num_sparse else None,
        experts_per_token=routing.top_k if num_sparse else 0,
    )


def _config(json: _Json) -> Qwen3MoeConfig:
    shared = config_of(json)
    for name in ("moe_intermediate_size", "decoder_sparse_step"):
        if getattr(json, name) < 1:
            raise ModelFormatError(
                f"config.json: {name} must be at least 1, not {getattr(json, name)}", field=name
            )
    named = {count for count in (json.num_experts, json.num_local_experts) if count is not None}
    if len(named) > 1:
        raise ModelFormatError(
            f"config.json: num_experts is {json.num_experts}, num_local_experts {json.num_local_experts}: "
            "they are names of one number",
            field="num_experts",
        )
    experts = named.pop() if named else 128
    dense = set(json.mlp_only_layers or ())
    return Qwen3MoeConfig(
        **msgspec.structs.asdict(shared),
        routing=Routing(experts, json.num_experts_per_tok, normalize=json.norm_topk_prob),
        expert_size=json.moe_intermediate_size,
        sparse_layers=frozenset(
            index
            for index in range(shared.num_layers)
            if index not in dense and (index + 1) % json.decoder_sparse_step == 0
        ),
    )
