"""Packs a tiny model's checkpoint as published ones are, and its twin as what the codes mean.

Int4 words are made by the definition of compressed-tensors 0.20 (``pack_to_int32``), of which
``test_packed_weights`` keeps bytes that the package itself wrote.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Packer = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
"""Of a name and a matrix: the tensors it is stored as, and what they mean."""

INT4_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "actorder": None,
                "dynamic": False,
            },
        }
    },
}
FLOAT8_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Return the int32 words [out, in / 8] of values from -8 to 7."""
    shifts = 4 * torch.arange(8)
    words = ((codes.long() + 8).view(codes.shape[0], -1, 8) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def int4(name: str, matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Round a matrix to values of four bits, groups of 32 with a bfloat16 scale."""
    groups = matrix.view(matrix.shape[0], -1, 32)
    scales = (groups.abs().amax(-1) / 7.5).bfloat16()
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7)
    stored = {
        name.replace(".weight", ".weight_packed"): pack_int4(codes.flatten(1)),
        name.replace(".weight", ".weight_scale"): scales,
        name.replace(".weight", ".weight_shape"): torch.tensor(matrix.shape),
    }
    return stored, (codes * scales.float().unsqueeze(-1)).flatten(1)


def float8(name: str, matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Round a matrix to e4m3 in blocks of 128 × 128 with a float32 scale; the last blocks may be less."""
    rows, columns = (-(-extent // 128) for extent in matrix.shape)
    scales = torch.empty(rows, columns)
    codes, meant = torch.empty_like(matrix).to(torch.float8_e4m3fn), torch.empty_like(matrix)
    for row in range(rows):
        for column in range(columns):
            block = (slice(row * 128, (row + 1) * 128), slice(column * 128, (column + 1) * 128))
            scales[row, column] = matrix[block].abs().max() / 448
            codes[block] = (matrix[block] / scales[row, column]).to(torch.float8_e4m3fn)
            meant[block] = codes[block].float() * scales[row, column]
    return {name: codes, f"{name}_scale_inv": scales}, meant


def pack(directory: Path, is_packed: Callable[[str], bool], packer: Packer, config: dict[str, Any]) -> None:
    """Pack the matrices of ``directory`` in place; ``directory``/twin gets what they mean."""
    twin = directory / "twin"
    twin.mkdir()
    tensors = load_file(directory / "model.safetensors")
    stored, meant = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        if is_packed(name):
            found, meant[name] = packer(name, tensor)
            stored |= found
        else:
            stored[name] = meant[name] = tensor
    save_file(meant, twin / "model.safetensors")
    raw = json.loads((directory / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(raw))
    save_file(stored, directory / "model.safetensors")
    raw.get("text_config", raw)["quantization_config"] = config
    (directory / "config.json").write_text(json.dumps(raw))
