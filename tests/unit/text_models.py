"""Small model directories with tokenizers of the two common kinds, made on the spot."""

import json
from pathlib import Path

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
