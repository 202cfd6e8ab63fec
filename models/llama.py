"""Llama 2/3 and their likes (SmolLM2 is one): grouped-query attention, SwiGLU, RMSNorm, rope.

Source: transformers' ``LlamaConfig`` (field names and defaults) and the published checkpoints' names.
"""

import math
from typing import Any

import msgspec

from models.parameter import Cut, ParameterSpec, Segment
from models.spec import KVGroup, ModelSpec
from protocol.errors import ModelFormatError, UnsupportedModelError

ARCHITECTURES = ("LlamaForCausalLM",)

_ROWS = Cut(dim=0, unit="row", pad=True)
_COLUMNS = Cut(dim=1, unit="column", pad=True)


class RopeScaling(msgspec.Struct, frozen=True):
    """Llama 3.1's frequency-dependent stretching, or a linear one where only ``factor`` counts."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class LlamaConfig(msgspec.Struct, frozen=True):
    """What the forward pass needs to know."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool


class _Json(msgspec.Struct):
    """The fields of config.json that are read; others are not our business."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None


def spec(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """Return the model that a ``config.json`` describes, computed in ``dtype``.

    Errors: ``ModelFormatError`` for a malformed one, ``UnsupportedModelError`` for what we lack.
    """
    try:
        json = msgspec.convert(raw, _Json)
    except msgspec.ValidationError as error:
        raise ModelFormatError(f"config.json: {error}", field="config.json") from None
    config = _config(json)
    eos = json.eos_token_id
    q, kv, ffn = (
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
        config.intermediate_size,
    )
    h = config.hidden_size
    per_layer = h * (q + 2 * kv) + q * h + 3 * h * ffn
    return ModelSpec(
        architecture="llama",
        config=config,
        num_layers=config.num_layers,
        hidden_size=h,
        vocab_size=config.vocab_size,
        max_context=json.max_position_embeddings,
        dtype=dtype,
        parameters=_parameters(config, dtype),
        skipped=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
        + ((r"lm_head\.weight",) if config.tied else ()),
        kv_groups=(
            KVGroup(
                name="full",
                layers=tuple(range(config.num_layers)),
                kv_heads=config.kv_heads,
                key_dim=config.head_dim,
                value_dim=config.head_dim,
                dtype=dtype,
            ),
        ),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        # Residual, normed input and the block's output; then qkv with its rotated copy and the
        # attention's output, or gate|up with the product, whichever is wider.
        activation_whole=3 * h,
        activation_cut=max(2 * (q + 2 * kv) + q, 3 * ffn),
        heads=config.heads,
        flops_per_token=2 * (config.num_layers * per_layer + h * config.vocab_size),
    )


def _config(json: _Json) -> LlamaConfig:
    heads = json.num_attention_heads
    sizes = {
        "hidden_size": json.hidden_size,
        "intermediate_size": json.intermediate_size,
        "num_hidden_layers": json.num_hidden_layers,
        "num_attention_heads": heads,
        "vocab_size": json.vocab_size,
        "max_position_embeddings": json.max_position_embeddings,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ModelFormatError(f"config.json: {name} must be at least 1, not {value}", field=name)
    kv_heads = json.num_key_value_heads or heads
    head_dim = json.head_dim or json.hidden_size // heads
    if kv_heads < 1 or heads % kv_heads:
        raise ModelFormatError(
            f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly",
            field="num_key_value_heads",
        )
    if json.head_dim is None and json.hidden_size % heads:
        raise ModelFormatError(
            f"config.json: hidden_size {json.hidden_size} is no multiple of {heads} heads and no "
            "head_dim is given",
            field="head_dim",
        )
    if head_dim < 2 or head_dim % 2:
        raise ModelFormatError(f"config.json: head_dim {head_dim} must be even", field="head_dim")
    if json.hidden_act != "silu":
        raise UnsupportedModelError(
            f"hidden_act {json.hidden_act!r} is not known for Llama, silu is", field="hidden_act"
        )
    if json.attention_bias or json.mlp_bias:
        raise UnsupportedModelError(
            "Llama with biases (attention_bias, mlp_bias) is not served", field="attention_bias"
        )
    rope = json.rope_parameters or json.rope_scaling or {}
    theta = rope.get("rope_theta", json.rope_theta if json.rope_theta is not None else 10000.0)
    return LlamaConfig(
        hidden_size=json.hidden_size,
        intermediate_size=json.intermediate_size,
        num_layers=json.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=json.vocab_size,
        norm_eps=json.rms_norm_eps,
        rope_theta=_number("rope_theta", theta),
        rope_scaling=_rope_scaling(rope),
        tied=json.tie_word_embeddings,
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelFormatError(f"config.json: {name} must be a number, not {value!r}", field=name)
    return float(value)


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UnsupportedModelError(
            f"rope type {kind!r} is not known here: default, linear and llama3 are",
            field="rope_scaling",
        )
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [name for name in names if name not in rope]
    if missing:
        raise ModelFormatError(
            f"config.json: rope type {kind} lacks {', '.join(missing)}", field="rope_scaling"
        )
    numbers = {name: _number(name, rope[name]) for name in names}
    if min(numbers.values()) <= 0 or (
        kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]
    ):
        raise ModelFormatError(
            f"config.json: rope {numbers} must be positive, low below high", field="rope_scaling"
        )
    if kind == "linear":
        return RopeScaling(kind, numbers["factor"])
    return RopeScaling(
        kind,
        numbers["factor"],
        numbers["low_freq_factor"],
        numbers["high_freq_factor"],
        int(numbers["original_max_position_embeddings"]),
    )


def _parameters(config: LlamaConfig, dtype: str) -> tuple[ParameterSpec, ...]:
    h, dim, ffn, vocab = (
        config.hidden_size,
        config.head_dim,
        config.intermediate_size,
        config.vocab_size,
    )
    q, kv = config.heads * dim, config.kv_heads * dim
    found = [
        ParameterSpec(
            "embedding",
            (Segment("model.embed_tokens.weight", (vocab, h), vocab),),
            dtype,
            place="first",
            cut=_ROWS,
        )
    ]
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."

        def one(
            name: str, source: str, shape: tuple[int, ...], units: int = 1, cut: Cut | None = None
        ) -> ParameterSpec:
            segment = Segment(f"{theirs}{source}.weight", shape, units)  # noqa: B023
            return ParameterSpec(ours + name, (segment,), dtype, layer=layer, cut=cut)  # noqa: B023

        found += [
            one("attention_norm", "input_layernorm", (h,)),
            ParameterSpec(
                ours + "qkv",
                (
                    Segment(f"{theirs}self_attn.q_proj.weight", (q, h), config.heads),
                    Segment(f"{theirs}self_attn.k_proj.weight", (kv, h), config.kv_heads),
                    Segment(f"{theirs}self_attn.v_proj.weight", (kv, h), config.kv_heads),
                ),
                dtype,
                layer=layer,
                cut=Cut(dim=0, unit="head", replicate=True),
            ),
            one("o", "self_attn.o_proj", (h, q), config.heads, Cut(dim=1, unit="head")),
            one("mlp_norm", "post_attention_layernorm", (h,)),
            ParameterSpec(
                ours + "gate_up",
                (
                    Segment(f"{theirs}mlp.gate_proj.weight", (ffn, h), ffn),
                    Segment(f"{theirs}mlp.up_proj.weight", (ffn, h), ffn),
                ),
                dtype,
                layer=layer,
                cut=_ROWS,
            ),
            one("down", "mlp.down_proj", (h, ffn), ffn, _COLUMNS),
        ]
    head_source = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    found += [
        ParameterSpec("norm", (Segment("model.norm.weight", (h,)),), dtype, place="last"),
        ParameterSpec(
            "head",
            (Segment(head_source, (vocab, h), vocab),),
            dtype,
            place="last",
            cut=_ROWS,
            alias_of="embedding" if config.tied else None,
        ),
    ]
    return tuple(found)
