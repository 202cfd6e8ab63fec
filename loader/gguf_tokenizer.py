"""tokenizer.json and tokenizer_config.json from the metadata of a GGUF file.

GGUF keeps a byte-level BPE's tokens, merges and token types, and names its pre-tokenizer; the rules
that a name stands for are stated here (source of the names: llama.cpp's ``llama_vocab``).
"""

from collections.abc import Callable
from typing import Any, Final

from protocol.errors import ModelFormatError, UnsupportedModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_MAX_TOKENS: Final = 1 << 22

Metadata = dict[str, Any]


def build(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    """Return the text of tokenizer.json and the content of tokenizer_config.json.

    Errors: ``UnsupportedModelError`` for a kind of tokenizer or a pre-tokenizer not known here,
    ``ModelFormatError`` for metadata that contradicts itself.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    make_pre_tokenizer = _pre_tokenizers().get(pre) if isinstance(pre, str) else None
    if kind != "gpt2" or make_pre_tokenizer is None:
        raise UnsupportedModelError(
            f"the GGUF's tokenizer is {kind!r} with pre-tokenizer {pre!r}; only 'gpt2' with "
            f"{', '.join(map(repr, _pre_tokenizers()))} can be converted",
            field="tokenizer.ggml.pre",
        )
    if metadata.get("tokenizer.ggml.add_bos_token") or metadata.get("tokenizer.ggml.add_space_prefix"):
        raise UnsupportedModelError(
            "the GGUF's tokenizer adds a token or a space before every text, which is not converted",
            field="tokenizer.ggml.add_bos_token",
        )
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelFormatError("the GGUF repeats a token", field="tokenizer.ggml.tokens")
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(metadata, vocabulary)))
    tokenizer.pre_tokenizer = make_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    added = _added(metadata, tokens)
    tokenizer.add_tokens([AddedToken(tokens[i], special=special, normalized=False) for i, special in added])
    config = {
        **{
            f"{name}_token": token
            for name, key in _SPECIAL.items()
            if (token := _token(metadata, key, tokens)) is not None
        },
        "added_tokens_decoder": {
            str(i): {
                "content": tokens[i],
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": special,
            }
            for i, special in added
        },
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise ModelFormatError("the GGUF's chat template is no text", field="tokenizer.chat_template")
        config["chat_template"] = template
    return tokenizer.to_str(pretty=True), config


_SPECIAL: Final = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}


def _pre_tokenizers() -> dict[str, Callable[[], Any]]:
    from tokenizers import pre_tokenizers

    def smollm() -> Any:
        # SmolLM's own tokenizer.json splits off each digit before the byte-level rule sees the text, so
        # that "  1" is two spaces and a one. transformers forgets that when it converts this GGUF.
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )

    return {"smollm": smollm}


def special_id(metadata: Metadata, name: str) -> int | None:
    """Return the id of the ``bos``, ``eos``, ``unk`` or ``pad`` token, where there is one.

    Errors: ``ModelFormatError`` for an id outside of the vocabulary.
    """
    key = _SPECIAL[name]
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < len(_texts(metadata, "tokenizer.ggml.tokens")):
        raise ModelFormatError(f"the GGUF's {key} is {value!r}, which is no token's id", field=key)
    return value


def _token(metadata: Metadata, key: str, tokens: list[str]) -> str | None:
    name = next(name for name, found in _SPECIAL.items() if found == key)
    value = special_id(metadata, name)
    return None if value is None else tokens[value]


def _texts(metadata: Metadata, key: str) -> list[str]:
    found = metadata.get(key)
    if (
        not isinstance(found, list)
        or len(found) > _MAX_TOKENS
        or not all(isinstance(t, str) for t in found)
    ):
        raise ModelFormatError(f"the GGUF's {key} is no list of texts", field=key)
    return found


def _merges(metadata: Metadata, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    pairs = []
    for text in _texts(metadata, key):
        left, space, right = text.partition(" ")
        if not space or not {left, right, left + right} <= vocabulary.keys():
            raise ModelFormatError(f"the GGUF's merge {text!r:.100} joins no two tokens", field=key)
        pairs.append((left, right))
    return pairs


def _added(metadata: Metadata, tokens: list[str]) -> list[tuple[int, bool]]:
    """Return id and specialness of the tokens that are matched before the text is split."""
    key = "tokenizer.ggml.token_type"
    types = metadata.get(key)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ModelFormatError(f"the GGUF's {key} has not one entry per token", field=key)
    added = []
    for i, kind in enumerate(types):
        if kind in (_CONTROL, _USER_DEFINED):
            added.append((i, kind == _CONTROL))
        elif kind not in (_NORMAL, _UNKNOWN):
            raise UnsupportedModelError(
                f"token {i} of the GGUF has type {kind!r}, not known here", field=key
            )
    return added
