"""What Llama and its descendants share: grouped-query attention, SwiGLU, RMSNorm and rope in a stack.

Field names and defaults of config.json are those of transformers' configuration classes; names of
tensors are those of the published checkpoints.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from models.parameter import Cut, ParameterSpec, Segment
from models.rope import RopeScaling, rope_of
from models.spec import KVGroup, ModelSpec, TokenChunks
from protocol.errors import ModelFormatError, UnsupportedModelError

_ROWS = Cut(dim=0, unit="row", pad=True)
_COLUMNS = Cut(dim=1, unit="column", pad=True)

J = TypeVar("J", bound="DecoderJson")


class DecoderConfig(msgspec.Struct, frozen=True):
    """What the forward pass needs to know."""

    hidden_size: int
    intermediate_size: int
    """Inner features of a dense feed-forward block."""
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool

    @property
    def query_size(self) -> int:
        """Features of all heads' queries."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of all KV heads' keys, or values."""
        return self.kv_heads * self.head_dim


class DecoderJson(msgspec.Struct):
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
    use_sliding_window: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None


def read_json(raw: dict[str, Any], kind: type[J]) -> J:
    """Return a config.json's fields. Errors: ``ModelFormatError`` for a missing one or a wrong type."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise ModelFormatError(f"config.json: {error}", field="config.json") from None


def config_of(json: DecoderJson) -> DecoderConfig:
    """Check the fields and return what the forward pass needs.

    Errors: ``ModelFormatError`` for sizes that contradict each other, ``UnsupportedModelError`` for
    biases, sliding windows and what else is not served.
    """
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
    head_dim = json.head_dim or json.hidden_size // heads
    if head_dim < 2 or head_dim % 2:
        raise ModelFormatError(f"config.json: head_dim {head_dim} must be even", field="head_dim")
    _refuse_what_is_not_served(json)
    theta, scaling = rope_of(json.rope_parameters or json.rope_scaling or {}, json.rope_theta)
    return DecoderConfig(
        hidden_size=json.hidden_size,
        intermediate_size=json.intermediate_size,
        num_layers=json.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=json.vocab_size,
        norm_eps=json.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tied=json.tie_word_embeddings,
    )


def _refuse_what_is_not_served(json: DecoderJson) -> None:
    if json.hidden_act != "silu":
        raise UnsupportedModelError(
            f"hidden_act {json.hidden_act!r} is not known here, silu is", field="hidden_act"
        )
    if json.attention_bias or json.mlp_bias:
        raise UnsupportedModelError(
            "models with biases (attention_bias, mlp_bias) are not served", field="attention_bias"
        )
    if json.use_sliding_window:
        raise UnsupportedModelError(
            "use_sliding_window is not served for this architecture: only full attention is",
            field="use_sliding_window",
        )


def decoder_spec(
    architecture: str,
    config: DecoderConfig,
    json: DecoderJson,
    dtype: str,
    layer_parameters: Callable[[int], tuple[ParameterSpec, ...]],
    *,
    num_dense: int,
    other_flops: int = 0,
    chunks: TokenChunks | None = None,
    experts_per_token: int = 0,
) -> ModelSpec:
    """Return the model whose layer ``i`` has ``layer_parameters(i)``, between the two ends.

    ``num_dense``: layers whose feed-forward block is dense. ``other_flops``: 2 × the multiply-adds of all
    other layers' blocks, for one token; ``chunks`` and ``experts_per_token``: see
    ``ModelSpec``.
    """
    h, q, kv = config.hidden_size, config.query_size, config.kv_size
    dense = 3 * config.intermediate_size if num_dense else 0
    embedding, norm, head = _ends(config, dtype)
    layers = [parameter for layer in range(config.num_layers) for parameter in layer_parameters(layer)]
    eos = json.eos_token_id
    return ModelSpec(
        architecture=architecture,
        config=config,
        num_layers=config.num_layers,
        hidden_size=h,
        vocab_size=config.vocab_size,
        max_context=json.max_position_embeddings,
        dtype=dtype,
        parameters=(embedding, *layers, norm, head),
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
        activation_cut=max(2 * (q + 2 * kv) + q, dense),
        heads=config.heads,
        flops_per_token=2 * h * (config.num_layers * 2 * (q + kv) + num_dense * dense + config.vocab_size)
        + other_flops,
        chunks=chunks,
        experts_per_token=experts_per_token,
    )


def attention_parameters(
    config: DecoderConfig, layer: int, dtype: str, *, head_norms: bool = False
) -> tuple[ParameterSpec, ...]:
    """Return a layer's two norms and its attention; ``head_norms``: queries and keys have norms too."""
    h, q, kv, source = config.hidden_size, config.query_size, config.kv_size, f"model.layers.{layer}."

    def norm(name: str, tensor: str, size: int) -> ParameterSpec:
        segment = Segment(f"{source}{tensor}.weight", (size,))
        return ParameterSpec(f"layers.{layer}.{name}", (segment,), dtype, layer=layer)

    def cut(name: str, segments: tuple[Segment, ...], how: Cut) -> ParameterSpec:
        return ParameterSpec(f"layers.{layer}.{name}", segments, dtype, layer=layer, cut=how)

    attention, dim = f"{source}self_attn.", config.head_dim
    qkv = (
        Segment(f"{attention}q_proj.weight", (q, h), config.heads),
        Segment(f"{attention}k_proj.weight", (kv, h), config.kv_heads),
        Segment(f"{attention}v_proj.weight", (kv, h), config.kv_heads),
    )
    o = Segment(f"{attention}o_proj.weight", (h, q), config.heads)
    norms = (norm("q_norm", "self_attn.q_norm", dim), norm("k_norm", "self_attn.k_norm", dim))
    return (
        norm("attention_norm", "input_layernorm", h),
        cut("qkv", qkv, Cut(dim=0, unit="head", replicate=True)),
        *(norms if head_norms else ()),
        cut("o", (o,), Cut(dim=1, unit="head")),
        norm("mlp_norm", "post_attention_layernorm", h),
    )


def dense_parameters(config: DecoderConfig, layer: int, dtype: str) -> tuple[ParameterSpec, ...]:
    """Return a layer's dense feed-forward block."""
    h, ffn, source = config.hidden_size, config.intermediate_size, f"model.layers.{layer}.mlp."
    gate_up = tuple(Segment(f"{source}{which}_proj.weight", (ffn, h), ffn) for which in ("gate", "up"))
    down = Segment(f"{source}down_proj.weight", (h, ffn), ffn)
    return (
        ParameterSpec(f"layers.{layer}.gate_up", gate_up, dtype, layer=layer, cut=_ROWS),
        ParameterSpec(f"layers.{layer}.down", (down,), dtype, layer=layer, cut=_COLUMNS),
    )


def _ends(config: DecoderConfig, dtype: str) -> tuple[ParameterSpec, ParameterSpec, ParameterSpec]:
    """Return embedding, last norm and head."""
    h, vocab = config.hidden_size, config.vocab_size
    embedding = Segment("model.embed_tokens.weight", (vocab, h), vocab)
    head = embedding if config.tied else Segment("lm_head.weight", (vocab, h), vocab)
    return (
        ParameterSpec("embedding", (embedding,), dtype, place="first", cut=_ROWS),
        ParameterSpec("norm", (Segment("model.norm.weight", (h,)),), dtype, place="last"),
        ParameterSpec(
            "head",
            (head,),
            dtype,
            place="last",
            cut=_ROWS,
            alias_of="embedding" if config.tied else None,
        ),
    )
