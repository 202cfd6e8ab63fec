"""Tiny models with packed weights, held against transformers on what their codes mean.

Experts' inner features of 96 are three groups of int4, so that degrees of 2 and 4 are padded. In float8
every matrix of a layer is packed; a hidden size of 192 leaves blocks that are less, and of heads of 64
features two share a block of the output's columns.
"""

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from protocol.errors import LayoutError, ModelFormatError
from protocol.topology import Topology
from tests.golden.harness import run_ranks_as_threads
from tests.golden.packed import FLOAT8_CONFIG, INT4_CONFIG, float8, int4, pack
from tests.golden.scored import Answer, check_answers, scored_answers
from tests.golden.test_deepseek_tiny import (
    NEW_TOKENS,
    PROMPT_LENGTHS,
    as_published,
    kimi,
    spread,
    text_config,
)

LAYOUTS = [(1, 1), (2, 2)]
"""Besides those that the matrix takes (test_matrix.py)."""
FLOAT8_SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "moe_intermediate_size": 256,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "initializer_range": 0.08,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@lru_cache
def tiny(root: Path, variant: str) -> tuple[Path, list[Answer]]:
    """Return a packed model's directory and the answers of its twin."""
    directory = root / variant.replace(" ", "-")
    torch.manual_seed(len(variant))
    is_float8 = variant == "deepseek float8"
    config = text_config(FLOAT8_SIZES if is_float8 else {"moe_intermediate_size": 96})
    model = kimi(config) if variant == "kimi int4" else DeepseekV3ForCausalLM(config)
    spread(model, 0.08 if is_float8 else 0.15)
    model.save_pretrained(directory)
    if is_float8:
        pack(directory, lambda name: "_proj" in name, float8, FLOAT8_CONFIG)
    else:
        pack(directory, lambda name: ".experts." in name, int4, INT4_CONFIG)
    twin = (
        type(model)
        .from_pretrained(directory / "twin", attn_implementation="eager", experts_implementation="eager")
        .eval()
    )
    if variant == "kimi int4":
        as_published(directory)
    return directory, scored_answers(twin, PROMPT_LENGTHS, NEW_TOKENS)


@pytest.mark.parametrize("variant", ["deepseek int4", "kimi int4", "deepseek float8"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_layout_matches_the_unpacked_twin(root: Path, variant: str, tp: int, pp: int) -> None:
    check_answers(*tiny(root, variant), Topology(tp, pp), NEW_TOKENS)


@pytest.mark.parametrize("variant", ["kimi int4", "deepseek float8"])
def test_placed_experts_match_the_unpacked_twin(root: Path, variant: str) -> None:
    check_answers(*tiny(root, variant), Topology(4, 1, 4), NEW_TOKENS)


def test_divided_positions_match_the_unpacked_twin(root: Path) -> None:
    check_answers(*tiny(root, "deepseek float8"), Topology(2, 1, 1, 2), NEW_TOKENS)


def test_heads_of_one_block_stay_together(root: Path) -> None:
    directory, _ = tiny(root, "deepseek float8")
    with pytest.raises(LayoutError, match=r"4 packed block of 2 heads\)"):
        run_ranks_as_threads(directory, Topology(8)).__enter__()


@pytest.mark.parametrize(
    ("variant", "tensor", "value"),
    [
        ("kimi int4", "language_model.model.layers.2.mlp.experts.7.down_proj.weight_scale", torch.nan),
        ("deepseek float8", "model.layers.1.self_attn.kv_b_proj.weight_scale_inv", -torch.inf),
    ],
)
def test_scales_that_are_no_numbers_end_the_load(
    root: Path, tmp_path: Path, variant: str, tensor: str, value: float
) -> None:
    directory, _ = tiny(root, variant)
    shutil.copy(directory / "config.json", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors[tensor][-1, -1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match="not finite") as refusal:
        run_ranks_as_threads(tmp_path, Topology(2)).__enter__()
    assert refusal.value.field == tensor
