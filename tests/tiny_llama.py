"""A Llama of a few hundred kilobytes with random weights, a tokenizer and a chat template."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from models.registry import load_spec
from tests.unit.text_models import CHATML, byte_level, directory


def write_tiny_llama(
    path: Path,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 2,
    context: int = 512,
    template: str | None = CHATML,
    vocab_size: int | None = None,
) -> Path:
    """Write the model and return its directory; the same weights at each call."""
    tokenizer = byte_level()
    directory(path, template, tokenizer)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": heads * 16,
        "intermediate_size": heads * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "vocab_size": vocab_size or -(-tokenizer.get_vocab_size() // 16) * 16,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
    }
    (path / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(0)
    shapes = {s.source: s.shape for p in load_spec(path).parameters for s in p.segments}
    tensors = {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
