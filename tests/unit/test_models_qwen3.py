"""Qwen3 and Qwen3-MoE as published, against straight arithmetic; and configurations that cannot be."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from models.layout import stage_bytes
from models.memory import CPU_OVERHEADS, StepLimits, plan_memory
from models.moe import CHUNK_TOKENS
from models.qwen3_moe import Qwen3MoeConfig
from models.registry import load_spec
from models.spec import ModelSpec
from protocol.errors import LayoutError, ModelFormatError, TandemError, UnsupportedModelError
from protocol.topology import Topology

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
}


def spec_of(tmp_path: Path, base: dict[str, Any], **changes: Any) -> ModelSpec:
    (tmp_path / "config.json").write_text(json.dumps(base | changes))
    return load_spec(tmp_path, "bfloat16")


def test_bytes_of_qwen3_8b(tmp_path: Path) -> None:
    model = spec_of(tmp_path, QWEN3_8B)
    layer = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 12288
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    whole = 2 * (36 * layer + norms + 2 * 151936 * 4096)
    assert whole == 16_381_470_720  # The published index's total_size.
    padding = 36 * 2 * (512 - 256)  # A head's norm has half of the arena's alignment.
    assert stage_bytes(model, Topology(), range(36)) == whole + padding
    assert model.flops_per_token == 2 * (36 * layer + 4096 * 151936)


def test_bytes_of_qwen3_30b_a3b(tmp_path: Path) -> None:
    model = spec_of(tmp_path, QWEN3_30B_A3B)
    attention, expert = 2048 * 128 * (2 * 32 + 2 * 4), 3 * 2048 * 768
    layer = attention + 128 * 2048 + 128 * expert
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    whole = 2 * (48 * layer + norms + 2 * 151936 * 2048)
    assert whole == 61_064_245_248  # The published index's total_size.
    assert stage_bytes(model, Topology(), range(48)) == whole + 48 * 2 * (512 - 256)
    assert model.flops_per_token == 2 * (48 * (attention + 128 * 2048 + 8 * expert) + 2048 * 151936)
    names = {s.source for p in model.layer_parameters(47) for s in p.segments}
    assert len(names) == 3 * 128 + 1 + 8
    assert "model.layers.47.mlp.experts.127.up_proj.weight" in names
    by_name = {p.name: p for p in model.layer_parameters(0)}
    assert by_name["layers.0.experts_gate_up"].local_shape(Topology(8)) == (128, 2 * 96, 2048)
    assert by_name["layers.0.experts_down"].local_shape(Topology(8)) == (128, 2048, 96)


def test_experts_hold_a_chunk_whatever_the_step(tmp_path: Path) -> None:
    model = spec_of(tmp_path, QWEN3_30B_A3B)

    def activations(step_tokens: int, tp: int) -> int:
        limits = StepLimits(max_rows=8, step_tokens=step_tokens, logit_rows=8, block_tokens=16)
        made = plan_memory(model, Topology(tp=tp), [80 << 30] * tp, limits, CPU_OVERHEADS, 4096)
        return {line.name: line.predicted_bytes for line in made.ranks[0].lines}["activations"]

    chunk = 9 * 2 * 2048 + 8 * 3 * 768 // 4
    assert activations(CHUNK_TOKENS, 4) == CHUNK_TOKENS * 2 * (3 * 2048 + chunk)
    # Attention's own widest moment overtakes a chunk's only in a step of many of them.
    assert activations(2 * CHUNK_TOKENS, 4) == CHUNK_TOKENS * 2 * (6 * 2048 + chunk)


@pytest.mark.parametrize("ep", [False, True])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_experts_are_cut_or_placed(tmp_path: Path, tp: int, ep: bool) -> None:
    model = spec_of(tmp_path, QWEN3_30B_A3B, num_hidden_layers=1, num_experts=16)
    topology = Topology(tp, ep=tp if ep else 1)
    for parameter in model.parameters:
        seen: dict[str, list[range]] = {}
        for rank in range(tp):
            local = parameter.flat_shape(topology)
            assert math.prod(local) == math.prod(parameter.local_shape(topology))
            row = 0
            for piece in parameter.pieces(topology, rank):
                assert piece.destination + piece.end - piece.start <= local[piece.dim]
                if parameter.stack and ep:
                    expert = int(piece.source.split("experts.")[1].split(".")[0])
                    assert expert // (16 // tp) == rank
                    assert (piece.dim, piece.start, piece.end) == (0, 0, piece.source_shape[0])
                    assert piece.row + piece.destination == row
                    row += piece.end
                seen.setdefault(piece.source, []).append(range(piece.start, piece.end))
            if parameter.stack and ep:
                assert row == local[0]
        for segment in parameter.segments:
            held = seen[segment.source]
            extent = segment.shape[
                parameter.cut.dim if parameter.cut and not (parameter.stack and ep) else 0
            ]
            assert {at for part in held for at in part} == set(range(extent))
            if parameter.stack:
                assert sum(map(len, held)) == extent  # No element of an expert is there twice.
    by_name = {p.name: p for p in model.parameters}
    shape = by_name["layers.0.experts_down"].local_shape(topology)
    assert shape == ((16 // tp, 2048, 768) if ep else (16, 2048, 768 // tp))


def test_experts_that_cannot_be_placed_say_which_degrees_could(tmp_path: Path) -> None:
    model = spec_of(tmp_path, QWEN3_30B_A3B, num_experts=12)
    with pytest.raises(
        LayoutError, match=r"8 cannot divide 12 experts; degrees that do: 1, 2, 3, 4, 6, 12"
    ):
        model.layer_parameters(0)[-1].local_shape(Topology(8, ep=8))


@pytest.mark.parametrize(
    ("step", "dense", "sparse"),
    [(1, [], {0, 1, 2, 3, 4, 5}), (2, [], {1, 3, 5}), (1, [0, 5], {1, 2, 3, 4}), (3, [2], {5})],
)
def test_which_layers_have_experts(tmp_path: Path, step: int, dense: list[int], sparse: set[int]) -> None:
    changes = {"num_hidden_layers": 6, "decoder_sparse_step": step, "mlp_only_layers": dense}
    model = spec_of(tmp_path, QWEN3_30B_A3B, **changes)
    assert isinstance(model.config, Qwen3MoeConfig)
    assert model.config.sparse_layers == sparse
    having = {p.layer for p in model.parameters if p.name.endswith("experts_down")}
    assert having == sparse
    assert {p.layer for p in model.parameters if p.name.endswith(".down")} == set(range(6)) - sparse


BAD: list[tuple[dict[str, Any], type[TandemError], str]] = [
    ({"num_experts_per_tok": 129}, ModelFormatError, "num_experts_per_tok"),
    ({"num_experts": 0}, ModelFormatError, "num_experts_per_tok"),
    ({"num_local_experts": 64}, ModelFormatError, "num_experts"),
    ({"moe_intermediate_size": 0}, ModelFormatError, "moe_intermediate_size"),
    ({"decoder_sparse_step": 0}, ModelFormatError, "decoder_sparse_step"),
    ({"mlp_only_layers": ["x"]}, ModelFormatError, "config.json"),
    ({"use_sliding_window": True}, UnsupportedModelError, "use_sliding_window"),
    ({"attention_bias": True}, UnsupportedModelError, "attention_bias"),
]


@pytest.mark.parametrize(("change", "kind", "field"), BAD)
def test_bad_configurations(
    tmp_path: Path, change: dict[str, Any], kind: type[TandemError], field: str
) -> None:
    with pytest.raises(kind) as refusal:
        spec_of(tmp_path, QWEN3_30B_A3B, **change)
    assert refusal.value.field == field
