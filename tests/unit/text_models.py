"""Small model directories with tokenizers of the two common kinds, made on the spot."""

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "over",
    "lazy",
    "and",
    "hello",
    "world",
    "é",
    "ü",
    "€",
    "日本",
    "😀",
    "naïve",
]


def byte_level() -> Tokenizer:
    """Byte-level BPE like SmolLM2's: 256 bytes, some merges, three special tokens first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i + 3 for i, c in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for word in WORDS:
        for spelt, _ in spell.pre_tokenize_str(" " + word):
            for end in range(2, len(spelt) + 1):
                pair = (spelt[: end - 1], spelt[end - 1])
                if pair[0] + pair[1] not in vocabulary:
                    vocabulary[pair[0] + pair[1]] = len(vocabulary) + 3
                    merges.append(pair)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary |= {token: i for i, token in enumerate(specials)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = spell
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("€uro", special=False)])
    return tokenizer


def byte_fallback(strip: int = 1) -> Tokenizer:
    """BPE with byte fallback like Llama 2's."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": b + 3 for b in range(256)}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", *(f"▁{w}" for w in WORDS), *WORDS, "é", "▁▁"]:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", strip, 0)] if strip else []))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def word_piece() -> Tokenizer:
    """A decoder that only the tokenizer's own stream knows."""
    vocabulary = {"[UNK]": 0, **{w: i + 1 for i, w in enumerate(WORDS)}}
    for piece in ("##s", "##ing", "##ed"):
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def directory(path: Path, template: str | None = CHATML, tokenizer: Tokenizer | None = None) -> Path:
    """Write a model directory's text files and return it."""
    path.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level()).save(str(path / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        "chat_template": template,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return path


KIMI_NAMES = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    9: "<|tool_calls_section_begin|>",
    10: "<|tool_calls_section_end|>",
    11: "<|tool_call_begin|>",
    12: "<|tool_call_argument_begin|>",
    13: "<|tool_call_end|>",
    16: "<|im_system|>",
    17: "<|im_middle|>",
    20: "<think>",
    21: "</think>",
}
"""By their distance from the last rank; gaps are there in Kimi's own too."""


def kimi_ranks() -> dict[bytes, int]:
    """Return a tiny vocabulary of byte pairs: all bytes, and the words with what leads to them."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in [*WORDS, "的", "中文", "123", "'ll", "\n\n", "  "]:
        for spelt in (word.encode(), (" " + word).encode()):
            for end in range(2, len(spelt) + 1):
                ranks.setdefault(spelt[:end], len(ranks))
    return ranks


def kimi_config() -> dict[str, Any]:
    """Return a tokenizer_config.json whose tool and thinking tokens are text, as in Kimi K2's."""
    first = len(kimi_ranks())
    named = {
        str(first + i): {"content": name, "special": "tool_call" not in name and "think" not in name}
        for i, name in KIMI_NAMES.items()
    }
    return {"added_tokens_decoder": named, "bos_token": "[BOS]", "eos_token": "<|im_end|>"}


def kimi_directory(path: Path, template: str) -> Path:
    """Write the text side of a Kimi checkpoint."""
    path.mkdir(exist_ok=True)
    lines = [base64.b64encode(piece) + b" %d" % rank for piece, rank in kimi_ranks().items()]
    (path / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    (path / "tokenizer_config.json").write_text(json.dumps(kimi_config()))
    if template:
        (path / "chat_template.jinja").write_text(template)
    return path
