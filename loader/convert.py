"""From a GGUF file to a model directory: sharded float32 safetensors, config and tokenizer. No torch.

Values are those of the ``gguf`` package's dequantisation, unchanged. Formats:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and https://huggingface.co/docs/safetensors.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from loader import gguf_tokenizer
from loader.index import check_against, read_index
from models.registry import load_spec
from protocol.errors import ModelFormatError, StorageError, UnsupportedModelError

SHARD_BYTES: Final = 200_000_000
_CHUNK_BYTES: Final = 8 << 20
"""Float32 bytes that are dequantised at a time: peak memory is a few times this."""
_PAGE: Final = 4096

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]

_WHOLE_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Tensor(msgspec.Struct, frozen=True):
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    raw: Any
    """gguf's ReaderTensor; its data is mapped, not read."""
    rope_heads: int
    """Heads whose rows are to be put back in order; 0: none."""

    @property
    def size(self) -> int:
        return 4 * math.prod(self.shape)


def convert(
    gguf: Path, target: Path, progress: Progress | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the model of a GGUF file into the empty directory ``target``; files are on disk at return.

    ``progress`` is called with bytes written and bytes in all.

    Errors: ``UnsupportedModelError`` for what is no Llama with a known tokenizer, ``ModelFormatError`` for
    a file that contradicts itself, ``StorageError`` naming the file that could not be written.
    """
    metadata, raw_tensors = _open(gguf)
    if metadata.get("general.architecture") != "llama":
        raise UnsupportedModelError(
            f"{gguf} has the architecture {metadata.get('general.architecture')!r}, only 'llama' can be "
            "converted",
            field="general.architecture",
        )
    config = _config(metadata, {t.name: t for t in raw_tensors})
    tokenizer, tokenizer_config = gguf_tokenizer.build(metadata)
    tensors = [_tensor(raw, config) for raw in raw_tensors]
    _write_shards(tensors, target, progress or (lambda _done, _total: None), shard_bytes)
    ids = {f"{name}_token_id": gguf_tokenizer.special_id(metadata, name) for name in ("bos", "eos", "pad")}
    known = {key: value for key, value in ids.items() if value is not None}
    _write_json(target / "config.json", config | known)
    _write_json(target / "generation_config.json", {"_from_model_config": True, **known})
    _write(target / "tokenizer.json", tokenizer.encode())
    _write_json(target / "tokenizer_config.json", tokenizer_config)
    check_against(load_spec(target), read_index(target))


def _open(gguf: Path) -> tuple[dict[str, Any], list[Any]]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
        return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors
    except OSError as error:
        raise StorageError(f"{gguf} cannot be read: {error.strerror or error}") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ModelFormatError(f"{gguf} is no proper GGUF file: {error}", field=gguf.name) from None


def _config(metadata: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    def number(key: str) -> int:
        value = metadata.get(f"llama.{key}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelFormatError(f"the GGUF's llama.{key} is {value!r}, not a size", field=f"llama.{key}")
        return value

    def real(key: str) -> float:
        value = metadata.get(f"llama.{key}")
        if not isinstance(value, float) or not math.isfinite(value):
            raise ModelFormatError(
                f"the GGUF's llama.{key} is {value!r}, not a number", field=f"llama.{key}"
            )
        # The shortest decimal of the float32 that the file holds: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value)))

    hidden, heads = number("embedding_length"), number("attention.head_count")
    kv_heads = number("attention.head_count_kv") if "llama.attention.head_count_kv" in metadata else heads
    head_dim = (
        number("attention.key_length") if "llama.attention.key_length" in metadata else hidden // heads
    )
    if (
        number("rope.dimension_count") != head_dim
        or metadata.get("llama.rope.scaling.type", "none") != "none"
    ):
        raise UnsupportedModelError(
            "the GGUF rotates part of a head or scales its rope, which is not converted",
            field="llama.rope.dimension_count",
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFormatError("the GGUF lacks token_embd.weight", field="token_embd.weight")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": int(embedding.shape[-1]),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": real("attention.layer_norm_rms_epsilon"),
        "rope_theta": real("rope.freq_base"),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": "output.weight" not in tensors,
        "use_cache": True,
        "torch_dtype": "float32",
    }


def _tensor(raw: Any, config: dict[str, Any]) -> _Tensor:
    layer = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)\.weight", raw.name)
    name = _WHOLE_NAMES.get(raw.name)
    if layer is not None and layer[2] in _LAYER_NAMES:
        name = f"model.layers.{int(layer[1])}.{_LAYER_NAMES[layer[2]]}.weight"
    if name is None:
        raise UnsupportedModelError(
            f"the GGUF's tensor {raw.name!r} has no place in a Llama as it is served here", field=raw.name
        )
    kind = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(layer[2] if layer else "")
    rope_heads = int(config[kind]) if kind else 0
    shape = tuple(int(extent) for extent in reversed(raw.shape))  # GGUF names the fastest dimension first
    if rope_heads and (len(shape) != 2 or shape[0] % (2 * rope_heads)):
        raise ModelFormatError(
            f"the GGUF's {raw.name} has shape {shape} for {rope_heads} heads", field=raw.name
        )
    return _Tensor(name, shape, raw, rope_heads)


def _write_shards(tensors: list[_Tensor], target: Path, progress: Progress, shard_bytes: int) -> None:
    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    total, done = sum(t.size for t in tensors), 0
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map.update({t.name: name for t in shard})
        with _Writer(target / name) as writer:
            writer.write(_header(shard))
            for tensor in shard:
                for chunk in _values(tensor):
                    writer.write(chunk.data.cast("B"))
                    done += chunk.nbytes
                    progress(done, total)
    _write_json(
        target / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _header(shard: list[_Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": "F32",
            "shape": tensor.shape,
            "data_offsets": [at, at + tensor.size],
        }
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format allows spaces after the JSON; so the data begin on a page and reads can be whole pages.
    text += b" " * (-(8 + len(text)) % _PAGE)
    return len(text).to_bytes(8, "little") + text


def _values(tensor: _Tensor) -> Iterator[Array]:
    """Yield a tensor's rows in order, dequantised to float32, a bounded number at a time."""
    from gguf.quants import dequantize

    data = tensor.raw.data
    rows = data if data.ndim > 1 else data.reshape(1, -1)
    columns = math.prod(tensor.shape[1:]) if data.ndim > 1 else tensor.shape[0]
    per_head = tensor.shape[0] // tensor.rope_heads if tensor.rope_heads else 1
    step = max(1, _CHUNK_BYTES // (4 * columns * per_head)) * per_head
    for start in range(0, len(rows), step):
        try:
            part = dequantize(rows[start : start + step], tensor.raw.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"the GGUF's {tensor.raw.name}: {error}", field=tensor.raw.name
            ) from None
        if tensor.rope_heads:
            part = _unpermuted(part, len(part) // per_head)
        yield np.ascontiguousarray(part, np.dtype("<f4"))


def _unpermuted(rows: Array, heads: int) -> Array:
    """Put the rows of q or k back as the model's authors keep them.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, transformers rows i and i + dim / 2; the
    converter to GGUF interleaves each head's halves for that.
    """
    half = len(rows) // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


class _Writer:
    """A new file that is on disk when the block ends; what goes wrong names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "_Writer":
        try:
            self._file = self._path.open("xb")
        except OSError as error:
            raise self._refusal(error) from None
        return self

    def write(self, content: bytes | memoryview) -> None:
        try:
            self._file.write(content)
        except OSError as error:
            raise self._refusal(error) from None

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
        except OSError as error:
            # Closing flushes; an error there must not hide the one that is on its way.
            if kind is None:
                raise self._refusal(error) from None

    def _refusal(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self._path} cannot be written: {error.strerror}; free some space or choose another cache "
            "directory",
            field=self._path.name,
        )


def _write(path: Path, content: bytes) -> None:
    with _Writer(path) as writer:
        writer.write(content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
