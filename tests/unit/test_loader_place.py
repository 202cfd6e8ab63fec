"""Conversion between dtypes against torch, bit by bit."""

from typing import Any

import numpy as np
import pytest
import torch

from loader.place import convert

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def all_float16() -> np.ndarray[Any, Any]:
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("source_dtype", ["float16", "bfloat16"])
def test_all_16_bit_patterns(source_dtype: str, dtype: str) -> None:
    check_conversion(all_float16(), source_dtype, dtype)


def test_float32_to_bfloat16() -> None:
    near = np.concatenate(
        [np.arange(256, dtype=np.uint32) << 23, (np.arange(256, dtype=np.uint32) << 23) | (1 << 31)]
    )
    ties = [near + d for d in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x18000, 0x17FFF, 0x7FFFFF, 0x7F8000)]
    random_ = np.random.default_rng(0).integers(0, 1 << 32, 300_000, dtype=np.uint32)
    check_conversion(np.concatenate([*ties, random_]), "float32", "bfloat16")


def check_conversion(bits: np.ndarray[Any, Any], source_dtype: str, dtype: str) -> None:
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
    source = bits.view(kinds[source_dtype]).reshape(1, -1)
    target = np.zeros(source.shape, kinds[dtype])
    convert(source, source_dtype, target, dtype)
    integers = {2: np.int16, 4: np.int32}
    tensor = torch.from_numpy(bits.view(integers[bits.itemsize]).copy()).view(TORCH[source_dtype])
    expected = tensor.to(TORCH[dtype])
    found = torch.from_numpy(target.view(integers[target.itemsize])).view(TORCH[dtype]).reshape(-1)
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    as_integers = {2: torch.int16, 4: torch.int32}[target.itemsize]
    assert torch.equal(found.view(as_integers)[~nan], expected.view(as_integers)[~nan])
    assert torch.equal(found.signbit()[nan], tensor.signbit()[nan])
