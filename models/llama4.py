"""Llama 4: layers that see all positions, without rope, among layers that see the current chunk, with it.

Source: transformers' ``Llama4TextConfig`` (field names and defaults) and the published checkpoints' names.
Experts of a layer are two tensors, [experts, in, out]; they are kept as they lie on disk, so that nothing
is transposed on the way from a drive. KV groups: the global layers are one, the chunked ones are dealt out,
in turn, to as many groups of that size as they fill, so that the blocks of all groups are equal.
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
from models.moe import Routing, expert_chunks
from models.parameter import Cut, ParameterSpec, Segment
from models.spec import KVGroup, ModelSpec
from protocol.errors import ModelFormatError, UnsupportedModelError

CONDITIONAL = "Llama4ForConditionalGeneration"
ARCHITECTURES = ("Llama4ForCausalLM", CONDITIONAL)

_VISION = (r"vision_model\..+", r"multi_modal_projector\..+")
_INNER = "inner feature of an expert"
_CHUNKED, _FULL = "chunked_attention", "full_attention"


class Llama4Config(DecoderConfig, frozen=True):
    """What the forward pass needs to know."""

    routing: Routing
    expert_size: int
    """Inner features of one expert, and of the one that all tokens share."""
    sparse_layers: frozenset[int]
    """Layers whose feed-forward block is a mixture of experts."""
    rope_layers: frozenset[int]
    """Layers whose queries and keys rotate."""
    chunked_layers: frozenset[int]
    """Layers whose queries see the tokens of their chunk alone."""
    chunk: int
    """Tokens of a chunk."""
    has_qk_norm: bool
    """Whether rotated queries and keys are divided by their root mean square."""
    is_tuned: bool
    """Whether queries of layers without rope are scaled by ln(1 + ⌊(p + 1) / floor⌋) · scale + 1."""
    tuning_floor: int
    tuning_scale: float


class _Json(DecoderJson, kw_only=True):
    intermediate_size_mlp: int = 16384
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float | None = 500000.0
    num_experts_per_tok: int = 1
    num_local_experts: int = 16
    moe_layers: list[int] | None = None
    interleave_moe_layer_step: int = 1
    use_qk_norm: bool = True
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = 4
    attention_chunk_size: int | None = 8192
    layer_types: list[str] | None = None
    attn_temperature_tuning: bool | int = True
    """Early files have a number, of which only whether it is 0 counts."""
    floor_scale: int = 8192
    attn_scale: float = 0.1
    quantization_config: dict[str, Any] | None = None


def spec(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """Return the model that a ``config.json`` describes, computed in ``dtype``.

    Errors: ``ModelFormatError`` for a malformed one, ``UnsupportedModelError`` for what we lack.
    """
    is_conditional = raw.get("architectures", [""])[0] == CONDITIONAL
    json = read_json(_text_of(raw) if is_conditional else raw, _Json)
    config = _config(json)
    h, routing, size = config.hidden_size, config.routing, config.expert_size

    def layer(index: int) -> tuple[ParameterSpec, ...]:
        attention = attention_parameters(config, index, dtype)
        if index in config.sparse_layers:
            return attention + _sparse_parameters(config, index, dtype)
        return attention + _dense_parameters(config, index, dtype)

    num_sparse = len(config.sparse_layers)
    model = decoder_spec(
        "llama4",
        config,
        json,
        dtype,
        layer,
        num_dense=config.num_layers - num_sparse,
        other_flops=2 * num_sparse * h * (routing.experts + 3 * (routing.top_k + 1) * size),
        chunks=expert_chunks(routing, h, size) if num_sparse else None,
        experts_per_token=routing.top_k if num_sparse else 0,
    )
    prefix = "language_model." if is_conditional else ""
    return msgspec.structs.replace(
        model,
        parameters=tuple(_with_prefix(parameter, prefix) for parameter in model.parameters),
        skipped=(_VISION if is_conditional else ())
        + tuple(prefix.replace(".", r"\.") + pattern for pattern in model.skipped),
        kv_groups=_kv_groups(config, model.kv_groups[0]),
    )


def _text_of(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the text model's part of a config.json, which ties its ends as the whole one says."""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ModelFormatError(
            f"config.json: text_config must be an object, not {text!r}", field="text_config"
        )
    tied = {"tie_word_embeddings": raw["tie_word_embeddings"]} if "tie_word_embeddings" in raw else {}
    return text | tied


def _with_prefix(parameter: ParameterSpec, prefix: str) -> ParameterSpec:
    segments = tuple(
        msgspec.structs.replace(segment, source=f"{prefix}{segment.source}")
        for segment in parameter.segments
    )
    return msgspec.structs.replace(parameter, segments=segments)


def _kv_groups(config: Llama4Config, whole: KVGroup) -> tuple[KVGroup, ...]:
    """Return the layer groups: of each kind as many as keep them near the size of the smaller kind."""
    full = [layer for layer in range(config.num_layers) if layer not in config.chunked_layers]
    chunked = sorted(config.chunked_layers)
    least = min(len(layers) for layers in (full, chunked) if layers)
    found = []
    for kind, layers in (("full", full), ("chunked", chunked)):
        count = max(round(len(layers) / least), 1) if layers else 0
        found += [
            msgspec.structs.replace(
                whole,
                name=kind if count == 1 else f"{kind} {turn}",
                layers=tuple(layers[turn::count]),
                kind=kind,
                window=config.chunk if kind == "chunked" else 0,
            )
            for turn in range(count)
        ]
    return tuple(found)


def _dense_parameters(config: Llama4Config, layer: int, dtype: str) -> tuple[ParameterSpec, ...]:
    """Return a dense block's parameters, whose tensors are called ``feed_forward`` here."""
    return tuple(
        msgspec.structs.replace(
            parameter,
            segments=tuple(
                msgspec.structs.replace(s, source=s.source.replace(".mlp.", ".feed_forward."))
                for s in parameter.segments
            ),
        )
        for parameter in dense_parameters(config, layer, dtype)
    )


def _sparse_parameters(config: Llama4Config, layer: int, dtype: str) -> tuple[ParameterSpec, ...]:
    """Return a mixture of experts, [experts, in, out] each, and the block that all tokens share."""
    h, size, experts = config.hidden_size, config.expert_size, config.routing.experts
    source = f"model.layers.{layer}.feed_forward."

    def one(name: str, segments: tuple[Segment, ...], cut: Cut | None, stack: int = 0) -> ParameterSpec:
        return ParameterSpec(f"layers.{layer}.{name}", segments, dtype, layer=layer, cut=cut, stack=stack)

    shared = f"{source}shared_expert."
    gate_up = tuple(Segment(f"{shared}{which}_proj.weight", (size, h), size) for which in ("gate", "up"))
    fused = Segment(f"{source}experts.gate_up_proj", (experts, h, 2 * size), size, repeats=2)
    down = Segment(f"{source}experts.down_proj", (experts, size, h), size)
    return (
        one("router", (Segment(f"{source}router.weight", (experts, h)),), None),
        one("experts_gate_up", (fused,), Cut(dim=2, unit=_INNER, pad=True), experts),
        one("experts_down", (down,), Cut(dim=1, unit=_INNER, pad=True), experts),
        one("shared_gate_up", gate_up, Cut(dim=0, unit="row", pad=True)),
        one(
            "shared_down",
            (Segment(f"{shared}down_proj.weight", (h, size), size),),
            Cut(dim=1, unit="column", pad=True),
        ),
    )


def _config(json: _Json) -> Llama4Config:
    if json.quantization_config is not None:
        raise UnsupportedModelError(
            f"weights packed by {json.quantization_config.get('quant_method')!r} are not served for "
            "Llama 4: float32 and bfloat16 are",
            field="quantization_config",
        )
    shared = config_of(json)
    steps = ("interleave_moe_layer_step", "no_rope_layer_interval")
    for name in ("intermediate_size_mlp", *steps, "floor_scale"):
        if getattr(json, name) < 1:
            raise ModelFormatError(
                f"config.json: {name} must be at least 1, not {getattr(json, name)}", field=name
            )
    layers, step = range(shared.num_layers), json.interleave_moe_layer_step
    sparse = json.moe_layers if json.moe_layers is not None else list(layers[step - 1 :: step])
    rotates = json.no_rope_layers or [(i + 1) % json.no_rope_layer_interval for i in layers]
    types = json.layer_types or [_CHUNKED if rotate else _FULL for rotate in rotates]
    for name, found in (("no_rope_layers", rotates), ("layer_types", types)):
        if len(found) != len(layers):
            raise ModelFormatError(
                f"config.json: {name} says something of {len(found)} layers, there are {len(layers)}",
                field=name,
            )
    if not set(sparse) <= set(layers):
        raise ModelFormatError(
            f"config.json: moe_layers has {max(sparse)}, the layers are 0 to {len(layers) - 1}",
            field="moe_layers",
        )
    unknown = sorted(set(types) - {_CHUNKED, _FULL})
    if unknown:
        raise UnsupportedModelError(
            f"layer type {unknown[0]!r} is not served for Llama 4: {_CHUNKED} and {_FULL} are",
            field="layer_types",
        )
    chunked = frozenset(i for i in layers if types[i] == _CHUNKED)
    if chunked and (json.attention_chunk_size or 0) < 1:
        raise ModelFormatError(
            f"config.json: attention_chunk_size must be at least 1 where layers are chunked, not "
            f"{json.attention_chunk_size}",
            field="attention_chunk_size",
        )
    return Llama4Config(
        **msgspec.structs.asdict(shared)
        | {"intermediate_size": json.intermediate_size_mlp, "expert_size": json.intermediate_size},
        routing=Routing(json.num_local_experts, json.num_experts_per_tok, scores="sigmoid", weighs="input"),
        sparse_layers=frozenset(sparse),
        rope_layers=frozenset(i for i in layers if rotates[i]),
        chunked_layers=chunked,
        chunk=json.attention_chunk_size or 0,
        has_qk_norm=json.use_qk_norm,
        is_tuned=bool(json.attn_temperature_tuning),
        tuning_floor=json.floor_scale,
        tuning_scale=json.attn_scale,
    )
