"""Qwen3, dense: Llama's layers, with a norm of each head's queries and keys before they rotate.

Source: transformers' ``Qwen3Config`` (field names and defaults) and the published checkpoints' names.
"""

from typing import Any

from models.decoder import (
    DecoderJson,
    attention_parameters,
    config_of,
    decoder_spec,
    dense_parameters,
    read_json,
)
from models.parameter import ParameterSpec
from models.spec import ModelSpec

ARCHITECTURES = ("Qwen3ForCausalLM",)


class _Json(DecoderJson):
    num_key_value_heads: int | None = 32
    head_dim: int | None = 128
    max_position_embeddings: int = 32768


def spec(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """Return the model that a ``config.json`` describes, computed in ``dtype``.

    Errors: ``ModelFormatError`` for a malformed one, ``UnsupportedModelError`` for what we lack.
    """
    json = read_json(raw, _Json)
    config = config_of(json)

    def layer(index: int) -> tuple[ParameterSpec, ...]:
        attention = attention_parameters(config, index, dtype, head_norms=True)
        return attention + dense_parameters(config, index, dtype)

    return decoder_spec("qwen3", config, json, dtype, layer, num_dense=config.num_layers)
