"""The DeepSeek-V3 family: DeepSeek-V3 itself and the text stack of Kimi K2.5.

Multi-head latent attention (MLA, arXiv:2405.04434): a token's keys and values of all heads are linear in
one latent, which is all that is cached, beside one rotated part of the keys that the heads share. The
first layers are dense; those after them have routed experts and shared ones (arXiv:2412.19437).

The projections down to latents and the latents' norms are held whole on every rank, as the cached latent
is: cutting them would save 1.5 GiB a rank of Kimi K2.5 and cost a gather in every layer. The projections up
from latents and the output are cut by head, blocks by their inner features.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from models.deepseek_config import DeepseekConfig, Json, config_of
from models.moe import expert_chunks, expert_parameters
from models.packing import Packing, packing_of
from models.parameter import Cut, ParameterSpec, Segment
from models.spec import KVGroup, ModelSpec
from protocol.errors import UnsupportedModelError

KIMI = "KimiK25ForConditionalGeneration"
ARCHITECTURES = ("DeepseekV3ForCausalLM", KIMI)

_ROWS = Cut(dim=0, unit="row", pad=True)
_COLUMNS = Cut(dim=1, unit="column", pad=True)
_HEAD_ROWS = Cut(dim=0, unit="head")
_HEAD_COLUMNS = Cut(dim=1, unit="head")
_LINEAR = ("_proj.weight", "_proj_with_mqa.weight")
_VISION = (r"vision_tower\..+", r"mm_projector\..+")


def spec(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """Return the model that a ``config.json`` describes, computed in ``dtype``.

    Errors: ``ModelFormatError`` for a malformed one, ``UnsupportedModelError`` for what we lack.
    """
    is_kimi = raw.get("architectures", [""])[0] == KIMI
    config, json = (
        config_of(raw.get("text_config"), "config.json: text_config")
        if is_kimi
        else config_of(raw, "config.json")
    )
    prefix = "language_model." if is_kimi else ""
    packing = packing_of(json.quantization_config or raw.get("quantization_config"))
    eos = json.eos_token_id
    return ModelSpec(
        architecture="deepseek",
        config=config,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_context=json.max_position_embeddings,
        dtype=dtype,
        parameters=_parameters(config, dtype, prefix, packing),
        skipped=(_VISION if is_kimi else ())
        + _prediction_layers(json, prefix)
        + (packing.skipped if packing else ()),
        kv_groups=(
            KVGroup(
                name="latent",
                layers=tuple(range(config.num_layers)),
                kv_heads=1,
                key_dim=config.line_dim,
                value_dim=0,
                dtype=dtype,
                kind="latent",
                computed_dims=config.nope_dim + config.rope_dim + config.value_dim,
            ),
        ),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        activation_whole=_whole_elements(config),
        activation_cut=max(
            _attention_elements(config), 3 * config.intermediate_size, 3 * config.shared_size
        ),
        heads=config.heads,
        flops_per_token=2 * _multiply_adds(config),
        chunks=None
        if config.routing is None
        else expert_chunks(config.routing, config.hidden_size, config.expert_size),
        experts_per_token=config.routing.top_k if config.routing else 0,
    )


def _prediction_layers(json: Json, prefix: str) -> tuple[str, ...]:
    """Return patterns of the layers that predict further tokens, which stand after the last one."""
    first = json.num_hidden_layers
    return tuple(
        re.escape(f"{prefix}model.layers.{layer}.") + ".+"
        for layer in range(first, first + json.num_nextn_predict_layers)
    )


def _whole_elements(config: DeepseekConfig) -> int:
    """Return the elements per token that every rank holds at a layer's widest moment."""
    # Residual, normed input and output of a block; latents before and after their norms, or what the
    # routed experts gave beside what the shared ones do.
    latents = 2 * ((config.q_latent or 0) + config.line_dim)
    return 3 * config.hidden_size + max(latents, config.hidden_size if config.shared_size else 0)


def _attention_elements(config: DeepseekConfig) -> int:
    """Return the elements per token that all heads hold in attention, in the form that takes more."""
    key = config.nope_dim + config.rope_dim
    # The query, what the form makes of it and of the token, and what comes out of the sum.
    absorbed = key + 2 * config.line_dim + config.kv_latent + config.value_dim
    expanded = key + config.nope_dim + config.value_dim + 3 * max(key, config.value_dim) + config.value_dim
    return config.heads * max(absorbed, expanded)


def _multiply_adds(config: DeepseekConfig) -> int:
    """Return those of all matrix products but attention's, for one token."""
    h, heads = config.hidden_size, config.heads
    key = config.nope_dim + config.rope_dim
    queries = h * heads * key if config.q_latent is None else config.q_latent * (h + heads * key)
    keys_values = h * config.line_dim + config.kv_latent * heads * (config.nope_dim + config.value_dim)
    attention = queries + keys_values + heads * config.value_dim * h
    dense = 3 * h * config.intermediate_size
    total = config.num_layers * attention + config.num_dense_layers * dense + h * config.vocab_size
    if config.routing is not None:
        routing = config.routing
        experts = h * routing.experts + 3 * h * (routing.top_k * config.expert_size + config.shared_size)
        total += (config.num_layers - config.num_dense_layers) * experts
    return total


def _parameters(
    config: DeepseekConfig, dtype: str, prefix: str, packing: Packing | None
) -> tuple[ParameterSpec, ...]:
    h, vocab = config.hidden_size, config.vocab_size
    ends = {
        "embedding": (f"{prefix}model.embed_tokens.weight", (vocab, h)),
        "norm": (f"{prefix}model.norm.weight", (h,)),
        "head": (f"{prefix}lm_head.weight", (vocab, h)),
    }
    embedding, norm, head = (
        ParameterSpec(
            name,
            (Segment(source, shape, vocab if len(shape) == 2 else 1),),
            dtype,
            place="first" if name == "embedding" else "last",
            cut=_ROWS if len(shape) == 2 else None,
        )
        for name, (source, shape) in ends.items()
    )
    layers = [
        parameter
        for index in range(config.num_layers)
        for parameter in _Layer(config, dtype, f"{prefix}model.layers.{index}.", index, packing).stored()
    ]
    return (embedding, *layers, norm, head)


class _Layer:
    """The parameters of one decoder layer."""

    def __init__(
        self, config: DeepseekConfig, dtype: str, theirs: str, index: int, packing: Packing | None
    ) -> None:
        self._config, self._dtype, self._theirs, self._index = config, dtype, theirs, index
        self._packing = packing

    def stored(self) -> Iterator[ParameterSpec]:
        """Yield them as the checkpoint stores them."""
        for parameter in self.all():
            # Matrices of linear layers; the router is none of them.
            if self._packing is not None and parameter.segments[0].source.endswith(_LINEAR):
                yield from self._packing.parts(parameter)
            else:
                yield parameter

    def all(self) -> Iterator[ParameterSpec]:
        """Yield them as if nothing were packed."""
        config, h = self._config, self._config.hidden_size
        yield self._one("attention_norm", "input_layernorm", (h,))
        yield from self._attention()
        yield self._one("mlp_norm", "post_attention_layernorm", (h,))
        if self._index < config.num_dense_layers:
            yield from self._block("", "mlp.", config.intermediate_size)
        else:
            yield from self._experts()

    def _attention(self) -> Iterator[ParameterSpec]:
        config = self._config
        h, heads, line = config.hidden_size, config.heads, config.line_dim
        q = heads * (config.nope_dim + config.rope_dim)
        up = heads * (config.nope_dim + config.value_dim)
        units, rows, columns = self._head_cuts()
        down = [self._segment("self_attn.kv_a_proj_with_mqa", (line, h))]
        if config.q_latent is None:
            yield self._one("q", "self_attn.q_proj", (q, h), units, rows)
        else:
            down.insert(0, self._segment("self_attn.q_a_proj", (config.q_latent, h)))
            yield self._one("q_norm", "self_attn.q_a_layernorm", (config.q_latent,))
            yield self._one("q", "self_attn.q_b_proj", (q, config.q_latent), units, rows)
        yield self._fused("down_latents", down)
        yield self._one("kv_norm", "self_attn.kv_a_layernorm", (config.kv_latent,))
        yield self._one("kv", "self_attn.kv_b_proj", (up, config.kv_latent), units, rows)
        yield self._one("o", "self_attn.o_proj", (h, heads * config.value_dim), units, columns)

    def _head_cuts(self) -> tuple[int, Cut, Cut]:
        """Return how many parts heads fall into that no packing holds together, and the cuts by them."""
        config = self._config
        query = "q_proj" if config.q_latent is None else "q_b_proj"
        together = math.lcm(
            *(
                math.lcm(size, self._span(f"self_attn.{name}", dim)) // size
                for name, dim, size in (
                    (query, 0, config.nope_dim + config.rope_dim),
                    ("kv_b_proj", 0, config.nope_dim + config.value_dim),
                    ("o_proj", 1, config.value_dim),
                )
            )
        )
        if together == 1:
            return config.heads, _HEAD_ROWS, _HEAD_COLUMNS
        unit = f"packed block of {together} head"
        if config.heads % together:
            raise UnsupportedModelError(
                f"{config.heads} heads are no whole number of {unit}s", field="quantization_config"
            )
        return config.heads // together, Cut(dim=0, unit=unit), Cut(dim=1, unit=unit)

    def _inner_span(self, theirs: str, size: int) -> int:
        """Return how many inner features of a block stay together."""
        span = max(self._span(f"{theirs}gate_proj", 0), self._span(f"{theirs}down_proj", 1))
        if size % span:
            raise UnsupportedModelError(
                f"{self._theirs}{theirs}down_proj.weight has {size} columns: packed weights in groups of "
                f"{span} that fill them are served",
                field="quantization_config",
            )
        return span

    def _span(self, theirs: str, dim: int) -> int:
        return 1 if self._packing is None else self._packing.span(f"{self._theirs}{theirs}.weight", dim)

    def _experts(self) -> Iterator[ParameterSpec]:
        config = self._config
        assert config.routing is not None
        source = f"{self._theirs}mlp."
        yield from expert_parameters(
            self._index,
            source,
            config.routing,
            config.hidden_size,
            config.expert_size,
            self._dtype,
            self._inner_span("mlp.experts.0.", config.expert_size),
        )
        if config.shared_size:
            yield from self._block("shared_", "mlp.shared_experts.", config.shared_size)

    def _block(self, ours: str, theirs: str, size: int) -> Iterator[ParameterSpec]:
        h, units = self._config.hidden_size, size // self._inner_span(theirs, size)
        gate_up = [self._segment(f"{theirs}{name}_proj", (size, h), units) for name in ("gate", "up")]
        yield self._fused(f"{ours}gate_up", gate_up, _ROWS)
        yield self._one(f"{ours}down", f"{theirs}down_proj", (h, size), units, _COLUMNS)

    def _one(
        self, ours: str, theirs: str, shape: tuple[int, ...], units: int = 1, cut: Cut | None = None
    ) -> ParameterSpec:
        return self._fused(ours, [self._segment(theirs, shape, units)], cut)

    def _fused(self, ours: str, segments: list[Segment], cut: Cut | None = None) -> ParameterSpec:
        name = f"layers.{self._index}.{ours}"
        return ParameterSpec(name, tuple(segments), self._dtype, layer=self._index, cut=cut)

    def _segment(self, theirs: str, shape: tuple[int, ...], units: int = 1) -> Segment:
        return Segment(f"{self._theirs}{theirs}.weight", shape, units)
