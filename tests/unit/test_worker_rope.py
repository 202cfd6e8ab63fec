"""Rope against transformers' own tables, and against rotating pairs as complex numbers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kv.tensors import LayerCache
from models.rope import RopeScaling
from models.yarn import Yarn, yarn_of
from worker.backends.cpu import CpuBackend
from worker.context import BlockTable, RowSpan
from worker.layers.rope import Rope

CONTEXT = 600

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}
VARIANTS: list[tuple[dict[str, Any], RopeScaling | Yarn | None]] = [
    ({"rope_type": "default", "rope_theta": 10000.0}, None),
    ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}, RopeScaling("linear", 2.5)),
    (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
    ),
    (YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, Yarn(8.0, 32, 16.0, 2.0, 1.0, 0.7)),
    (YARN | {"beta_fast": 3.0, "beta_slow": 2.9, "factor": 1.0}, Yarn(1.0, 32, 3.0, 2.9)),
    (YARN, Yarn(8.0, 32, 16.0, 2.0)),
]


@pytest.mark.parametrize(("parameters", "scaling"), VARIANTS)
@pytest.mark.parametrize("dim", [2, 12, 64])
def test_tables_match_transformers(
    parameters: dict[str, Any], scaling: RopeScaling | Yarn | None, dim: int
) -> None:
    config = LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        head_dim=dim,
        max_position_embeddings=CONTEXT,
        rope_parameters=dict(parameters),
    )
    if isinstance(scaling, Yarn):
        assert yarn_of(parameters) == scaling
    positions = torch.tensor([0, 1, 2, 63, 64, 599])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    rope = Rope(parameters["rope_theta"], dim, scaling, CONTEXT, torch.float32)
    found = rope(positions)
    assert found.shape == (6, 3, dim // 2)
    torch.testing.assert_close(found[:, 0], cos[0, :, : dim // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, 2], sin[0, :, : dim // 2], rtol=0, atol=1e-6)
    assert torch.equal(found[:, 1], -found[:, 2])


def test_rotation_turns_pairs_in_the_complex_plane() -> None:
    heads, kv_heads, dim, tokens = 4, 2, 6, 5
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator)
    cache = LayerCache(0, torch.zeros(8, 2 * kv_heads * dim), kv_heads, dim, dim)
    backend = CpuBackend()
    plan = backend.plan_attention([RowSpan(0, 3, tokens, (BlockTable([0]),))], 0, 8, 2 * kv_heads * dim)
    rotation = Rope(100.0, dim, None, 16, torch.float32)(torch.arange(3, 3 + tokens))
    x = qkv[:, : (heads + kv_heads) * dim].reshape(tokens, -1, 2, dim // 2).double()
    turned = torch.complex(x[:, :, 0], x[:, :, 1]) * torch.complex(
        rotation[:, 0].double(), rotation[:, 2].double()
    ).unsqueeze(1)
    values = qkv[:, (heads + kv_heads) * dim :].clone()
    backend.rope_and_store(qkv, rotation, cache, plan)
    found = qkv[:, : (heads + kv_heads) * dim].view(tokens, -1, 2, dim // 2).double()
    torch.testing.assert_close(found[:, :, 0], turned.real, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[:, :, 1], turned.imag, rtol=1e-6, atol=1e-6)
    assert torch.equal(cache.lines[3:, : kv_heads * dim], qkv[:, heads * dim : (heads + kv_heads) * dim])
    assert torch.equal(cache.lines[3:, kv_heads * dim :], values)
    assert not cache.lines[:3].any()
