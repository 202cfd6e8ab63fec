"""Packings as data, exact unpacking, and the published sizes of the two models that are packed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.known import known_model
from models.packing import Packing, packing_of
from models.parameter import DTYPE_BYTES, Cut, ParameterSpec, Segment
from models.registry import build_spec
from models.spec import ModelSpec
from protocol.errors import ModelFormatError, TandemError, UnsupportedModelError
from protocol.topology import Topology
from tests.golden.packed import FLOAT8_CONFIG, INT4_CONFIG, pack_int4
from worker.backends import cpu_packed
from worker.backends.base import BlockFloat8Weight, Int4Weight
from worker.backends.cpu import CpuBackend

GIB = 1 << 30
PUBLISHED_WORDS = [1299153315, -974714581, 1299153315, -974714581]
"""What compressed-tensors 0.20 (``pack_to_int32``) makes of the row (7 k + 3) mod 16 - 8, k below 32."""


def model(name: str) -> ModelSpec:
    return build_spec(known_model(name).config, name, "bfloat16")


def test_words_are_those_of_the_package() -> None:
    codes = (torch.arange(32) * 7 + 3) % 16 - 8
    assert pack_int4(codes[None]).tolist() == [PUBLISHED_WORDS]
    weight = Int4Weight(torch.tensor([PUBLISHED_WORDS], dtype=torch.int32), torch.ones(1, 1))
    ((_, found),) = cpu_packed.unpacked_tiles(weight, torch.float32)
    assert found.tolist() == [codes.tolist()]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 1 << 30), st.sampled_from([32, 100, 1 << 20]))
@settings(max_examples=30, deadline=None)
def test_any_bits_of_int4_unpack_exactly(rows: int, groups: int, seed: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(1 << 31), 1 << 31, (rows, 4 * groups), generator=generator).to(torch.int32)
    scales = torch.randn(rows, groups, generator=generator).bfloat16()
    expected = [
        [
            (((word >> (4 * k)) & 15) - 8) * float(scales[row, index // 4])
            for index, word in enumerate(words[row].tolist())
            for k in range(8)
        ]
        for row in range(rows)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_packed, "TILE_ELEMENTS", tile)
        found = list(cpu_packed.unpacked_tiles(Int4Weight(words, scales), torch.float32))
    assert torch.cat([some for _, some in found]).tolist() == expected
    assert all(some.numel() <= max(tile, 32 * groups) for _, some in found)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (300, 200), (64, 513), (1, 1)])
def test_any_bits_of_float8_blocks_unpack_exactly(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    bits = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    bits[(bits & 127) == 127] = 0  # NaN compare with nothing
    codes = bits.view(torch.float8_e4m3fn)
    scales = torch.randn(-(-rows // 128), -(-columns // 128), generator=generator)
    wide = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    weight = BlockFloat8Weight(codes, scales)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_packed, "TILE_ELEMENTS", 1)
        tiles = [tile for _, tile in cpu_packed.unpacked_tiles(weight, torch.float32)]
    assert max(len(tile) for tile in tiles) <= 128
    assert torch.equal(torch.cat(tiles), codes.float() * wide)
    x = torch.randn(5, columns, generator=generator)
    assert torch.allclose(
        CpuBackend().linear(x, weight), x @ (codes.float() * wide).T, rtol=1e-4, atol=1e-2
    )


def test_kimi_layer_by_layer() -> None:
    kimi = model("kimi-k2.5")
    by_layer = [sum(p.local_bytes(Topology()) for p in kimi.layer_parameters(layer)) for layer in range(61)]
    assert by_layer[1] == by_layer[60] == pytest.approx(9.81e9, rel=1e-3)
    assert by_layer[0] == pytest.approx(1.0e9, rel=0.01)
    # An expert's words are half a byte a weight, its scales two bytes for each 32.
    weights = 384 * 3 * 2048 * 7168
    packed = [p for p in kimi.layer_parameters(1) if p.stack]
    assert sum(p.local_bytes(Topology()) for p in packed) == weights // 2 + weights // 32 * 2
    for topology in (Topology(8), Topology(8, 1, 8)):
        assert sum(p.local_bytes(topology) for p in packed) * 8 == weights // 2 + weights // 16
    whole = sum(p.local_bytes(Topology()) for p in kimi.parameters)
    each = sum(p.local_bytes(Topology(8)) for p in kimi.parameters)
    assert 8 * each - whole == 7 * sum(p.local_bytes(Topology(8)) for p in kimi.parameters if p.cut is None)
    assert each == pytest.approx(70.95 * GIB, rel=1e-3)
    down = sum(p.local_bytes(Topology(8)) for p in kimi.parameters if p.name.endswith("down_latents"))
    assert down * 7 / 8 == pytest.approx(1.5 * GIB, rel=0.02)
    # Beside the text model: the tower and projector (some 0.94 GB), shapes, and the headers of 64 files.
    assert 595_177_988_208 - whole == 972_636_272


def test_deepseek_keeps_float8_but_for_what_is_no_linear_layer() -> None:
    dtypes = {p.name.removeprefix("layers.3."): p.dtype for p in model("deepseek-v3").layer_parameters(3)}
    assert {name for name, dtype in dtypes.items() if dtype == "float8_e4m3fn"} == {
        "q", "kv", "o", "down_latents", "shared_gate_up", "shared_down", "experts_gate_up", "experts_down",
    }  # fmt: skip
    assert dtypes["router"] == "bfloat16"
    assert dtypes["kv_scales"] == "float32"


def changed(**changes: Any) -> dict[str, Any]:
    group = INT4_CONFIG["config_groups"]["group_0"]
    weights = group["weights"] | changes
    return INT4_CONFIG | {"config_groups": {"group_0": group | {"weights": weights}}}


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ({"quant_method": "gptq"}, UnsupportedModelError),
        (INT4_CONFIG | {"format": "int-quantized"}, UnsupportedModelError),
        (INT4_CONFIG | {"config_groups": {}}, UnsupportedModelError),
        (INT4_CONFIG | {"config_groups": [1]}, ModelFormatError),
        (INT4_CONFIG | {"ignore": "lm_head"}, ModelFormatError),
        (INT4_CONFIG | {"ignore": ["re:(a+)+$"]}, UnsupportedModelError),
        (INT4_CONFIG | {"ignore": ["re:.*.*.*.*.*x"]}, UnsupportedModelError),
        (changed(num_bits=8), UnsupportedModelError),
        (changed(group_size=128), UnsupportedModelError),
        (changed(symmetric=False), UnsupportedModelError),
        (changed(symmetric=1), UnsupportedModelError),
        (changed(actorder="weight"), UnsupportedModelError),
        (changed(strategy="channel"), UnsupportedModelError),
        (FLOAT8_CONFIG | {"weight_block_size": [64, 64]}, UnsupportedModelError),
        (FLOAT8_CONFIG | {"fmt": "e5m2"}, UnsupportedModelError),
        (FLOAT8_CONFIG | {"activation_scheme": "static"}, UnsupportedModelError),
        (FLOAT8_CONFIG | {"modules_to_not_convert": ["lm_head"]}, UnsupportedModelError),
    ],
)
def test_other_packings_are_refused(raw: dict[str, Any], kind: type[TandemError]) -> None:
    with pytest.raises(kind) as refusal:
        packing_of(raw)
    assert refusal.value.field == "quantization_config"


@pytest.mark.parametrize(
    ("source", "is_packed"),
    [
        ("language_model.model.layers.7.mlp.experts.3.up_proj.weight", True),
        ("language_model.model.layers.7.mlp.shared_experts.up_proj.weight", False),
        ("language_model.model.layers.0.mlp.up_proj.weight", False),
        ("language_model.model.layers.7.self_attn.o_proj.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_what_is_ignored(source: str, is_packed: bool) -> None:
    packing = packing_of(INT4_CONFIG)
    assert packing is not None
    assert packing.packs(source) is is_packed


@pytest.mark.parametrize(
    ("kind", "shape", "units", "dim"),
    [
        ("int4", (8, 40), 1, 0),
        ("int4", (8, 96), 6, 1),
        ("float8", (256, 256), 4, 0),
        ("float8", (9, 192), 3, 1),
    ],
)
def test_groups_and_blocks_are_never_divided(
    kind: Any, shape: tuple[int, int], units: int, dim: int
) -> None:
    parameter = ParameterSpec(
        "o", (Segment("o_proj.weight", shape, units),), "bfloat16", cut=Cut(dim=dim, unit="part")
    )
    with pytest.raises(UnsupportedModelError, match=r"o_proj\.weight"):
        list(Packing(kind).parts(parameter))


def test_matrices_of_one_parameter_are_packed_alike() -> None:
    segments = (Segment("gate_proj.weight", (32, 32)), Segment("up_proj.weight", (32, 32)))
    with pytest.raises(UnsupportedModelError, match="all or none"):
        list(Packing("int4", ("gate",)).parts(ParameterSpec("gate_up", segments, "float32")))


def test_dtypes_have_their_sizes() -> None:
    size: Callable[[str], int] = lambda name: getattr(torch, name).itemsize  # noqa: E731
    assert {name: size(name) for name in DTYPE_BYTES} == DTYPE_BYTES
