import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from loader import convert as convert_module
from loader.convert import convert
from loader.index import check_against, read_index
from models.registry import load_spec
from protocol.errors import ModelFormatError, StorageError, TandemError, UnsupportedModelError
from tests.tiny_gguf import TEMPLATE, vocabulary, write_gguf


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("chunk", [1, 10_000, 8 << 20])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_exact(
    tied: bool, chunk: int, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", tied)
    monkeypatch.setattr(convert_module, "_CHUNK_BYTES", chunk)
    seen: list[tuple[int, int]] = []
    convert(tmp_path / "tiny.gguf", target, lambda *s: seen.append(s), shard_bytes=60_000)
    found: dict[str, Any] = {}
    for file in sorted(target.glob("*.safetensors")):
        assert file.stat().st_size < 60_000 + 10_000 or len(load_file(file)) == 1
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], values), name
    assert len(list(target.glob("*.safetensors"))) > 1
    total = sum(v.nbytes for v in expected.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_what_is_written_is_servable_and_page_aligned(tmp_path: Path, target: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", target)
    model, checkpoint = load_spec(target), read_index(target)
    check_against(model, checkpoint)
    assert min(t.offset for t in checkpoint.tensors.values()) % 4096 == 0
    config = json.loads((target / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert (config["rope_theta"], config["rms_norm_eps"]) == (100000.0, 1e-5)
    assert model.eos_token_ids == (2,)
    assert (model.max_context, model.heads, model.num_layers) == (128, 4, 2)
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_tokenizer(tmp_path: Path, target: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", target)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    tokens, _ = vocabulary()
    assert tokenizer.encode("<|im_start|>hello<|im_end|>").ids == [1, tokens.index("hello"), 2]
    # Digits one by one, before the byte-level rule: two spaces stay together, the digit alone.
    assert tokenizer.encode("  12").tokens == ["ĠĠ", "1", "2"]
    text = "hello  hello 0123 ünïcödé 漢字 🙂\n\t<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config["chat_template"] == TEMPLATE
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("changes", "kind", "named"),
    [
        ({"architecture": "qwen2"}, UnsupportedModelError, "qwen2"),
        ({"tokenizer__ggml__pre": "llama-bpe"}, UnsupportedModelError, "llama-bpe"),
        ({"tokenizer__ggml__model": "llama"}, UnsupportedModelError, "gpt2"),
        ({"tokenizer__ggml__add_bos_token": True}, UnsupportedModelError, "before every text"),
        ({"llama__rope__dimension_count": np.uint32(8)}, UnsupportedModelError, "rope"),
        ({"llama__rope__scaling__type": "yarn"}, UnsupportedModelError, "rope"),
        ({"llama__block_count": None}, ModelFormatError, "block_count"),
        ({"llama__block_count": "two"}, ModelFormatError, "block_count"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, ModelFormatError, "epsilon"),
        ({"llama__rope__freq_base": float("nan")}, ModelFormatError, "freq_base"),
        ({"tokenizer__ggml__eos_token_id": np.uint32(10_000)}, ModelFormatError, "eos_token_id"),
        ({"tokenizer__ggml__merges": ["h q"]}, ModelFormatError, "merge"),
        ({"tokenizer__ggml__token_type": [1, 1]}, ModelFormatError, "token_type"),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, ModelFormatError, "repeats"),
        ({"tokenizer__ggml__tokens": None}, ModelFormatError, "tokens"),
        # Contradictions between metadata and tensors are found by the check of what was written.
        ({"llama__block_count": np.uint32(3)}, ModelFormatError, "lacks"),
        ({"llama__block_count": np.uint32(1)}, ModelFormatError, "holds"),
        ({"llama__feed_forward_length": np.uint32(7)}, ModelFormatError, "shape"),
    ],
)
def test_refusals(
    changes: dict[str, Any], kind: type[TandemError], named: str, tmp_path: Path, target: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(kind, match=named):
        convert(tmp_path / "tiny.gguf", target)


@pytest.mark.parametrize("keep", [0, 3, 20, 1000, 9000])
def test_a_truncated_gguf(keep: int, tmp_path: Path, target: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    os.truncate(path, keep)
    with pytest.raises(ModelFormatError, match=r"tiny\.gguf"):
        convert(path, target)


def test_a_gguf_that_is_not_there(tmp_path: Path, target: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere\.gguf"):
        convert(tmp_path / "nowhere.gguf", target)


def test_a_full_disk_names_the_file(tmp_path: Path, target: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # EFBIG; Python ignores SIGXFSZ
    try:
        with pytest.raises(StorageError, match=r"model-00001-of-00001\.safetensors cannot be written"):
            convert(tmp_path / "tiny.gguf", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
