"""The fast detokenizers against the tokenizer's own decoding of everything."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from orchestrator.text.detokenizer import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    Detokenizer,
    DetokenizerFactory,
    StreamDetokenizer,
)
from orchestrator.text.stop import StopStrings
from tests.unit.text_models import byte_fallback, byte_level, word_piece

TOKENIZERS = {
    "byte_level": (byte_level(), ByteLevelDetokenizer),
    "byte_fallback": (byte_fallback(), ByteFallbackDetokenizer),
    "byte_fallback_unstripped": (byte_fallback(0), ByteFallbackDetokenizer),
    "byte_fallback_strip_2": (byte_fallback(2), ByteFallbackDetokenizer),
}
FACTORIES = {name: DetokenizerFactory(tokenizer) for name, (tokenizer, _) in TOKENIZERS.items()}


def in_pieces(detokenizer: Detokenizer, token_ids: list[int], sizes: random.Random) -> str:
    text, at = "", 0
    while at < len(token_ids):
        size = sizes.choice([1, 1, 1, 2, 5])
        text += detokenizer.push(token_ids[at : at + size])
        at += size
    return text + detokenizer.finish()


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_deltas_add_up_to_the_whole_decoding(name: str, data: st.DataObject) -> None:
    tokenizer, _ = TOKENIZERS[name]
    # Ids beyond the vocabulary too: embeddings are often padded.
    ids = st.integers(0, tokenizer.get_vocab_size() + 3)
    token_ids = data.draw(st.lists(ids, max_size=40))
    sizes = random.Random(data.draw(st.integers(0, 1000)))
    whole = tokenizer.decode(
        [t for t in token_ids if tokenizer.id_to_token(t) is not None], skip_special_tokens=True
    )
    assert in_pieces(FACTORIES[name].make(), token_ids, sizes) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fast_path_is_chosen_and_real_text_survives(name: str) -> None:
    tokenizer, kind = TOKENIZERS[name]
    detokenizer = FACTORIES[name].make()
    assert type(detokenizer) is kind
    text = "hello 日本 world 😀😀 naïve\u0000é"
    token_ids = tokenizer.encode(text).ids
    assert in_pieces(detokenizer, token_ids, random.Random(0)) == tokenizer.decode(token_ids)


def test_an_incomplete_character_is_withheld() -> None:
    tokenizer = byte_level()
    detokenizer = DetokenizerFactory(tokenizer).make()
    token_ids = tokenizer.encode("x🦊").ids
    assert len(token_ids) == 5
    assert [detokenizer.push([t]) for t in token_ids] == ["x", "", "", "", "🦊"]
    assert detokenizer.push(token_ids[1:3]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_another_decoder_goes_through_the_tokenizer() -> None:
    tokenizer: Tokenizer = word_piece()
    token_ids = tokenizer.encode("the dogs jumped over a fox").ids
    detokenizer = DetokenizerFactory(tokenizer).make()
    assert isinstance(detokenizer, StreamDetokenizer)
    assert in_pieces(detokenizer, token_ids, random.Random(1)) == tokenizer.decode(token_ids)


def naive_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=1500, deadline=None)
@given(
    text=st.text("ab\n", max_size=40),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=6), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_stop_strings_equal_the_naive_search(text: str, stops: list[str], seed: int) -> None:
    rest, given_out, stopped = text, "", False
    sizes, finder = random.Random(seed), StopStrings(stops)
    whole, expected = naive_stop(text, stops)
    while rest and not stopped:
        size = sizes.choice([1, 1, 2, 3, 9])
        safe, stopped = finder.push(rest[:size])
        rest = rest[size:]
        given_out += safe
        assert whole.startswith(given_out)
    if not stopped:
        given_out += finder.flush()
    assert (given_out, stopped) == (whole, expected)


def test_only_what_may_become_a_stop_string_is_withheld() -> None:
    finder = StopStrings(["</s>", "\n\n"])
    assert finder.push("a<") == ("a", False)
    assert finder.push("b\n") == ("<b", False)
    assert finder.push("c</") == ("\nc", False)
    assert finder.push("s>tail") == ("", True)
