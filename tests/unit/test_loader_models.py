"""Arenas of every model in the tree, at every layout, against slices that ``safe_open`` takes.

Bytes are random and on disk in the parameters' own dtypes (conversion: ``test_loader_plan.py``): so words
of int4, float8 codes and their scales are compared too.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from loader.index import INDEX_NAME, check_against, read_index
from loader.plan import plan_load
from models.known import known_model
from models.layout import arena, check_degrees
from models.registry import build_spec
from models.spec import ModelSpec
from protocol.errors import LayoutError
from protocol.topology import Topology
from tests.unit.test_loader_plan import even_stages, run_all

LAYERS = 4
TORCH = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_ATTENTION = {
    "hidden_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 101,
}
_LATENT = _ATTENTION | {
    "num_key_value_heads": 8,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_HEAD_DIMS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""A block of float8 each, so that heads can be told apart."""
SMALLER: dict[str, dict[str, Any]] = {
    "llama-3-8b": _ATTENTION | {"intermediate_size": 70},
    "smollm2-135m": _ATTENTION
    | {"intermediate_size": 70, "num_attention_heads": 9, "num_key_value_heads": 3},
    "qwen3-8b": _ATTENTION | {"intermediate_size": 70},
    "qwen3-30b-a3b": _ATTENTION | {"moe_intermediate_size": 44, "num_experts": 8, "num_experts_per_tok": 2},
    "llama-4-scout": _ATTENTION
    | {"intermediate_size": 44, "intermediate_size_mlp": 44, "num_local_experts": 8},
    "deepseek-v3": _LATENT | dict.fromkeys(_HEAD_DIMS, 128) | {"n_group": 2, "topk_group": 1},
    "kimi-k2.5": _LATENT,
}


def small(name: str, dtype: str) -> ModelSpec:
    """Return a model of the published configuration, made small."""
    config = dict(known_model(name).config)
    if "text_config" in config:
        config["text_config"] = config["text_config"] | SMALLER[name]
    else:
        config |= SMALLER[name]
    for key in ("no_rope_layers", "layer_types", "moe_layers"):
        config.get("text_config", config).pop(key, None)
    return build_spec(config, name, dtype)


def write(directory: Path, model: ModelSpec, shards: int, seed: int) -> dict[str, torch.Tensor]:
    """Write random bytes in random files; scales are finite. Return the tensors as bits."""
    generator = torch.Generator().manual_seed(seed)
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    places: dict[str, str] = {}
    for parameter in model.parameters:
        dtype = TORCH[parameter.dtype]
        for segment in parameter.segments:
            if segment.source in places:
                continue
            if parameter.scales_of is None:
                size = math.prod(segment.shape) * dtype.itemsize
                values = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype)
            else:
                values = torch.randn(math.prod(segment.shape), generator=generator).to(dtype)
            where = int(torch.randint(0, shards, (1,), generator=generator))
            files[where][segment.source] = values.view(segment.shape)
            places[segment.source] = f"part-{where}.safetensors"
    for where, held in enumerate(files):
        if held:
            save_file(held, directory / f"part-{where}.safetensors")
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return {name: tensor.view(BITS[tensor.element_size()]) for name, tensor in found.items()}


def expected(
    tensors: dict[str, torch.Tensor], model: ModelSpec, topology: Topology, stages: Any, rank: int
) -> bytes:
    held = arena(model, topology, stages, rank)
    result = torch.zeros(held.size, dtype=torch.uint8)
    for placed in held.placed:
        if placed.is_alias:
            continue
        spec = placed.spec
        local = torch.zeros(spec.flat_shape(topology), dtype=BITS[TORCH[spec.dtype].itemsize])
        for piece in spec.pieces(topology, topology.tp_rank(rank)):
            extent = piece.end - piece.start
            rows = local if piece.dim == 0 else local.narrow(0, piece.row, piece.source_shape[0])
            part = tensors[piece.source].narrow(piece.dim, piece.start, extent)
            rows.narrow(piece.dim, piece.destination, extent).copy_(part)
        flat = local.reshape(-1).view(torch.uint8)
        result[placed.offset : placed.offset + len(flat)] = flat
    return result.numpy().tobytes()


def check(case: dict[str, Any], directory: Path) -> str:
    model = small(case["model"], case["dtype"])
    topology = Topology(tp=case["tp"], pp=case["pp"], ep=case["tp"] if case["is_placed"] else 1)
    try:
        check_degrees(model, topology)
    except LayoutError:
        return "refused"
    stages = even_stages(LAYERS, topology.pp)
    tensors = write(directory, model, case["shards"], case["seed"])
    checkpoint = read_index(directory)
    check_against(model, checkpoint)
    plan = plan_load(model, checkpoint, topology, stages)
    assert plan.total_bytes == sum(tensor.length for tensor in checkpoint.tensors.values())
    for rank, held in enumerate(run_all(plan, 2)):
        size = plan.arena_bytes[rank]
        assert held[:size] == expected(tensors, model, topology, stages, rank), (rank, topology)
    return "compared"


cases = st.fixed_dictionaries(
    {
        "model": st.sampled_from(sorted(SMALLER)),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "tp": st.integers(1, 8),
        "pp": st.integers(1, 4),
        "is_placed": st.booleans(),
        "shards": st.integers(1, 5),
        "seed": st.integers(0, 1 << 20),
    }
)


@pytest.mark.parametrize("name", sorted(SMALLER))
@pytest.mark.parametrize(
    ("tp", "pp", "is_placed"), [(1, 1, False), (3, 2, False), (4, 1, True), (8, 2, False)]
)
def test_arenas_of_a_model(name: str, tp: int, pp: int, is_placed: bool, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    case = {"model": name, "dtype": "bfloat16", "tp": tp, "pp": pp, "is_placed": is_placed}
    found = check(case | {"shards": 3, "seed": tp}, tmp_path)
    heads = 9 if name == "smollm2-135m" else 8
    has_experts = name in ("qwen3-30b-a3b", "llama-4-scout", "deepseek-v3", "kimi-k2.5")
    is_possible = heads % tp == 0 and (has_experts or not is_placed)
    assert found == ("compared" if is_possible else "refused")


@pytest.mark.long
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases)
def test_arenas_of_all_models_full(tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    check(case, tmp_path_factory.mktemp("checkpoint"))
