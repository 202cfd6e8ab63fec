"""Configurations of models that benchmarks make anew with random weights.

Those that ``models/known`` has, and tiny ones that are nobody's, small enough for a test, two of them with
heads for eight ranks; ``small-latent`` has attention of DeepSeek-V3's dims.
"""

from collections.abc import Mapping
from typing import Any

from models.known import known_model, known_names

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
}
_TINY_FOR_EIGHT = _LLAMA | {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    # All layers are dense.
    "first_k_dense_replace": 4,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KNOWN: Mapping[str, Mapping[str, Any]] = {
    name: {key: value for key, value in known_model(name).config.items() if key != "torch_dtype"}
    for name in known_names()
} | {
    "tiny": _LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "tiny-8-8": _TINY_FOR_EIGHT | {"num_key_value_heads": 8},
    "tiny-8-2": _TINY_FOR_EIGHT | {"num_key_value_heads": 2},
    "tiny-latent": _LATENT
    | {
        "hidden_size": 64,
        "intermediate_size": 160,
        "vocab_size": 2048,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
    },
    "small-latent": _LATENT
    | {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "vocab_size": 2048,
        "q_lora_rank": 384,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}
"""``config.json`` by name, without the dtype."""


def name_of(config: Mapping[str, Any]) -> str | None:
    """Return which known model a ``config.json`` describes in full, None where it is none of them."""
    for name, known in KNOWN.items():
        if all(config.get(key) == value for key, value in known.items()):
            return name
    return None
