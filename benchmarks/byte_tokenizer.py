"""A tokenizer for a model that has random weights: every id has a text, so that answers are detokenised."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def write_byte_tokenizer(path: Path, vocab_size: int, special_ids: tuple[int, ...]) -> None:
    """Write a byte-level BPE ``tokenizer.json`` of ``vocab_size`` tokens.

    ``special_ids`` have no text; of the others the first 256 are the bytes, the rest made-up words of four
    letters, half of them after a space. There are no merges: a text is tokenised into its bytes.
    """
    if vocab_size < 256 + len(special_ids):
        raise ValueError(f"a vocabulary of {vocab_size} has no room for 256 bytes and {special_ids}")
    specials = {f"<|special_{token_id}|>": token_id for token_id in special_ids}
    ids = [token_id for token_id in range(vocab_size) if token_id not in special_ids]
    texts = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts += [_word(number) for number in range(len(ids) - len(texts))]
    vocabulary = specials | dict(zip(texts, ids, strict=True))
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    tokenizer.save(str(path), pretty=False)


def _word(number: int) -> str:
    letters, rest = "", number // 2
    for _ in range(4):
        rest, letter = divmod(rest, 26)
        letters += chr(ord("a") + letter)
    # The byte alphabet's character for a space.
    return "Ġ" * (number % 2) + letters
