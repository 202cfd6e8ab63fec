"""A Llama of a few kilobytes as a GGUF file and as a wheel, for tests of conversion and pulling."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from loader.catalogue import WheelModel

HEADS, KV_HEADS, DIM, FFN, LAYERS = 4, 2, 16, 96, 2
HIDDEN = HEADS * DIM
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_tokens() -> list[str]:
    """Return GPT-2's printable stand-ins for the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(moved))]


def vocabulary() -> tuple[list[str], list[str]]:
    merges = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "Ġ h"]
    return [*SPECIALS, *byte_tokens(), *(m.replace(" ", "") for m in merges)], merges


def rope_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the halves of each head, as llama.cpp's converter does."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, tied: bool = True, scale: int = 1, **changes: Any) -> dict[str, np.ndarray]:
    """Write the model and return its tensors, in float32, by their Hugging Face names.

    ``changes`` replace metadata (None: leave out). ``scale`` multiplies the MLP's width.
    """
    random_ = np.random.default_rng(0)
    ffn = FFN * scale
    tokens, merges = vocabulary()
    quantised = GGMLQuantizationType.Q4_1
    shapes: dict[str, tuple[str, tuple[int, ...], GGMLQuantizationType]] = {
        "token_embd": ("model.embed_tokens", (len(tokens), HIDDEN), GGMLQuantizationType.Q8_0),
        "output_norm": ("model.norm", (HIDDEN,), GGMLQuantizationType.F32),
    }
    if not tied:
        shapes["output"] = ("lm_head", (len(tokens), HIDDEN), GGMLQuantizationType.F16)
    for i in range(LAYERS):
        theirs, ours = f"blk.{i}.", f"model.layers.{i}."
        shapes |= {
            f"{theirs}attn_norm": (f"{ours}input_layernorm", (HIDDEN,), GGMLQuantizationType.F32),
            f"{theirs}attn_q": (f"{ours}self_attn.q_proj", (HEADS * DIM, HIDDEN), quantised),
            f"{theirs}attn_k": (f"{ours}self_attn.k_proj", (KV_HEADS * DIM, HIDDEN), quantised),
            f"{theirs}attn_v": (f"{ours}self_attn.v_proj", (KV_HEADS * DIM, HIDDEN), quantised),
            f"{theirs}attn_output": (f"{ours}self_attn.o_proj", (HIDDEN, HEADS * DIM), quantised),
            f"{theirs}ffn_norm": (f"{ours}post_attention_layernorm", (HIDDEN,), GGMLQuantizationType.F32),
            f"{theirs}ffn_gate": (f"{ours}mlp.gate_proj", (ffn, HIDDEN), quantised),
            f"{theirs}ffn_up": (f"{ours}mlp.up_proj", (ffn, HIDDEN), GGMLQuantizationType.BF16),
            f"{theirs}ffn_down": (f"{ours}mlp.down_proj", (HIDDEN, ffn), quantised),
        }
    metadata: dict[str, Any] = {
        "llama.block_count": np.uint32(LAYERS),
        "llama.context_length": np.uint32(128),
        "llama.embedding_length": np.uint32(HIDDEN),
        "llama.feed_forward_length": np.uint32(ffn),
        "llama.attention.head_count": np.uint32(HEADS),
        "llama.attention.head_count_kv": np.uint32(KV_HEADS),
        "llama.rope.dimension_count": np.uint32(DIM),
        "llama.rope.freq_base": 100000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
        "tokenizer.ggml.padding_token_id": np.uint32(2),
        "tokenizer.chat_template": TEMPLATE,
    }
    writer = GGUFWriter(path, changes.pop("architecture", "llama"))
    for key, value in (metadata | {k.replace("__", "."): v for k, v in changes.items()}).items():
        match value:
            case None:
                pass
            case np.uint32():
                writer.add_uint32(key, int(value))
            case bool():
                writer.add_bool(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
            case _:
                raise TypeError(f"{key}: {value!r}")
    expected = {}
    for name, (theirs, shape, kind) in shapes.items():
        values = random_.standard_normal(shape, np.float32)
        packed = values if kind == GGMLQuantizationType.F32 else quantize(values, kind)
        exact = dequantize(packed, kind).reshape(shape)
        expected[f"{theirs}.weight"] = exact
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.rpartition(".")[2], 0)
        if heads:
            # Rows are quantised one by one, so they can be moved when packed.
            packed = rope_rows(packed, heads)
        raw_dtype = None if packed.dtype in (np.float32, np.float16) else kind
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def write_wheel(directory: Path, gguf: Path, package: str = "tandem-tiny-model") -> WheelModel:
    """Pack a GGUF as a wheel into ``directory`` and return its catalogue entry."""
    name = package.replace("-", "_")
    wheel = f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}/model.gguf": gguf.read_bytes(),
        f"{info}/LICENSE": b"Do what you like.\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(directory / wheel, "w") as archive:
        for path, content in (files | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(path, content)
    digest = hashlib.sha256((directory / wheel).read_bytes()).hexdigest()
    return WheelModel(package, "1.0", wheel, digest, f"{name}/model.gguf", f"{info}/LICENSE")
