"""Llama 2/3 and their likes (SmolLM2 is one): grouped-query attention, SwiGLU, RMSNorm, rope.

Source: transformers' ``LlamaConfig`` (field names and defaults) and the published checkpoints' names.
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

ARCHITECTURES = ("LlamaForCausalLM",)


def spec(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """Return the model that a ``config.json`` describes, computed in ``dtype``.

    Errors: ``ModelFormatError`` for a malformed one, ``UnsupportedModelError`` for what we lack.
    """
    json = read_json(raw, DecoderJson)
    config = config_of(json)

    def layer(index: int) -> tuple[ParameterSpec, ...]:
        return attention_parameters(config, index, dtype) + dense_parameters(config, index, dtype)

    return decoder_spec("llama", config, json, dtype, layer, num_dense=config.num_layers)
