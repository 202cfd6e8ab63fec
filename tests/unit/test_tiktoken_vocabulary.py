"""Kimi's vocabulary: equal to tiktoken's own encoding, whole again when decoded, bounded in time."""

import asyncio
import base64
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.text import TextService
from orchestrator.text.detokenizer import DetokenizerFactory
from orchestrator.text.tiktoken_vocabulary import SPLIT_PATTERN, TiktokenVocabulary, split_runs
from protocol.errors import ModelFormatError
from tests.unit.text_models import kimi_config, kimi_directory, kimi_ranks

RANKS = kimi_ranks()
FIRST = len(RANKS)
TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from(
        ["的", "中文", "Han", " the", "\n", "  ", "'ll", "123456", "é", "😀", "\u00a0", "?!", "ß", "İ"]
    ),
    max_size=30,
).map("".join)


def vocabulary(directory: Path, config: dict[str, Any] | None = None) -> TiktokenVocabulary:
    return TiktokenVocabulary.load(
        kimi_directory(directory, ""), kimi_config() if config is None else config
    )


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> TiktokenVocabulary:
    return vocabulary(tmp_path_factory.mktemp("kimi"))


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_plain_text_is_encoded_as_tiktoken_does(kimi: TiktokenVocabulary, text: str) -> None:
    own = tiktoken.Encoding("own", pat_str=SPLIT_PATTERN, mergeable_ranks=RANKS, special_tokens={})
    token_ids = kimi.encode(text, as_prompt=True)
    assert token_ids == own.encode_ordinary(text)
    assert kimi.decode(token_ids) == own.decode(token_ids) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, FIRST + 260), max_size=40), st.integers(0, 1000))
def test_deltas_add_up_to_the_whole(kimi: TiktokenVocabulary, token_ids: list[int], seed: int) -> None:
    detokenizer, cuts, text, at = DetokenizerFactory(kimi).make(), random.Random(seed), "", 0
    while at < len(token_ids):
        size = cuts.choice([1, 1, 2, 5])
        text += detokenizer.push(token_ids[at : at + size])
        at += size
    assert text + detokenizer.finish() == kimi.decode(token_ids)


def test_han_is_split_from_other_letters() -> None:
    # Of Kimi's pattern alone: with another one the two would be one piece, and merge.
    ranks = dict(RANKS) | {"中a".encode(): FIRST}
    own = tiktoken.Encoding("own", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert FIRST not in own.encode_ordinary("中a")
    assert own.encode_ordinary("12345") == own.encode_ordinary("123") + own.encode_ordinary("45")


def test_named_tokens_are_found_and_only_special_ones_have_no_text(kimi: TiktokenVocabulary) -> None:
    token_ids = kimi.encode("a<|im_end|><|tool_call_begin|>b", as_prompt=False)
    assert token_ids == [RANKS[b"a"], FIRST + 2, FIRST + 11, RANKS[b"b"]]
    assert kimi.decode(token_ids) == "a<|tool_call_begin|>b"
    assert kimi.encode(f"<|reserved_token_{FIRST + 255}|>", as_prompt=False) == [FIRST + 255]


@settings(max_examples=200, deadline=None)
@given(st.text("ab \n\u3000", max_size=60), st.integers(1, 7))
def test_runs_are_cut_and_nothing_is_lost(text: str, longest: int) -> None:
    pieces = list(split_runs(text, longest))
    assert "".join(pieces) == text
    for piece in pieces:
        run = 1
        for before, after in itertools.pairwise(piece):
            run = run + 1 if before.isspace() == after.isspace() else 1
            assert run <= longest


@pytest.mark.parametrize("unit", ["a", " ", "的", "!", "a\u0301", "\n"])
def test_a_hostile_megabyte_ends_within_its_bound(tmp_path: Path, unit: str) -> None:
    async def run() -> list[int]:
        text = await TextService.start(kimi_directory(tmp_path, ""), deadline_s=20.0)
        try:
            return await text.encode(unit * (1_000_000 // len(unit)), 10_000_000)
        finally:
            await text.close()

    started = time.monotonic()
    token_ids = asyncio.run(run())
    assert time.monotonic() - started < 25.0
    assert token_ids


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([b"YQ== 0 1"], "line 1"),
        ([b"??? 0"], "line 1"),
        ([b"YQ== x"], "line 1"),
        ([b"YQ== 5"], "ranks"),
        ([b"YQ== 0"], "no token for byte 0x00"),
    ],
)
def test_a_malformed_vocabulary_is_named(tmp_path: Path, lines: list[bytes], what: str) -> None:
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines))
    with pytest.raises(ModelFormatError, match=what):
        TiktokenVocabulary.load(tmp_path, {})


@pytest.mark.parametrize(
    "named",
    [
        {"3": {"content": "x"}},
        {"x": {"content": "x"}},
        {str(FIRST): {"content": 3}},
        {str(FIRST): {}},
        {str(FIRST): {"content": "x"}, str(FIRST + 1): {"content": "x"}},
        {str(FIRST + 256): {"content": "x"}},
        [],
    ],
)
def test_malformed_names_are_refused(tmp_path: Path, named: Any) -> None:
    with pytest.raises(ModelFormatError, match=r"added_tokens_decoder|content of token"):
        vocabulary(tmp_path, {"added_tokens_decoder": named})


def test_the_file_is_what_tiktoken_reads(tmp_path: Path) -> None:
    lines = (kimi_directory(tmp_path, "") / "tiktoken.model").read_bytes().splitlines()
    assert {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines)} == RANKS
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
