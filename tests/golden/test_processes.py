"""SmolLM2-135M in float32, served by real processes, against transformers (smollm2.json).

What ranks as threads show of every layout (test_smollm2.py) is shown here once of the whole way: command
line, orchestrator, worker processes, gateway and SDK.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tandem import AsyncClient, Client, Result
from tests.golden.test_smollm2 import NUM_TOKENS, ROWS, TOLERANCE
from tests.server import Server, served

MEMORY_GIB = "3"
FEW = (1, 14)
SUBJECT = 16
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 16, "ignore_eos": True}
SHARED = [(3, 1), (1, 2)]
OTHERS = [(1, 1), (3, 2), (1, 4)]


def layout(model: Path, tp: int, pp: int) -> Any:
    return served(model, "--tp", f"{tp}", "--pp", f"{pp}", "--memory", MEMORY_GIB, name=f"tp{tp}-pp{pp}")


@pytest.fixture(scope="module")
def servers(smollm2: Path) -> Iterator[dict[tuple[int, int], Server]]:
    with layout(smollm2, 3, 1) as first, layout(smollm2, 1, 2) as second:
        yield dict(zip(SHARED, (first, second), strict=True))


@pytest.fixture(scope="module")
def tp3(servers: dict[tuple[int, int], Server]) -> Server:
    return servers[3, 1]


def together(server: Server, requests: list[dict[str, Any]]) -> list[Result]:
    """Return the answers to requests that are asked at once, over one connection."""

    async def ask() -> list[Result]:
        async with AsyncClient(server.name, runtime_directory=server.place.root) as client:
            return await asyncio.gather(*(client.generate(**request) for request in requests))

    return asyncio.run(ask())


def greedy(row: int, max_tokens: int = NUM_TOKENS) -> dict[str, Any]:
    return {
        "prompt_ids": ROWS[row]["prompt_ids"],
        "temperature": 0.0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "logprobs": 0,
    }


def check(result: Result, row: int, max_tokens: int = NUM_TOKENS) -> None:
    assert result.prompt_ids == ROWS[row]["prompt_ids"]
    assert result.token_ids == ROWS[row]["token_ids"][:max_tokens], row
    assert result.logprobs is not None
    assert [scored.token_id for scored in result.logprobs] == result.token_ids
    found = [scored.logprob for scored in result.logprobs]
    assert found == pytest.approx(ROWS[row]["logprobs"][:max_tokens], abs=TOLERANCE)


def answers_as_transformers(server: Server, max_tokens: int = NUM_TOKENS) -> None:
    results = together(server, [greedy(row, max_tokens) for row in FEW])
    for row, result in zip(FEW, results, strict=True):
        check(result, row, max_tokens)


@pytest.mark.parametrize(("of", "max_tokens"), [(SHARED[0], NUM_TOKENS), (SHARED[1], 24)])
def test_the_server_answers_as_transformers(
    servers: dict[tuple[int, int], Server], of: tuple[int, int], max_tokens: int
) -> None:
    answers_as_transformers(servers[of], max_tokens)


@pytest.mark.long
@pytest.mark.parametrize(("tp", "pp"), OTHERS)
def test_every_other_layout_answers_as_transformers(smollm2: Path, tp: int, pp: int) -> None:
    with layout(smollm2, tp, pp) as server:
        answers_as_transformers(server)


@pytest.mark.long
@pytest.mark.parametrize("of", SHARED)
def test_all_prompts_at_once(servers: dict[tuple[int, int], Server], of: tuple[int, int]) -> None:
    results = together(servers[of], [greedy(row) for row in range(len(ROWS))])
    for row, result in enumerate(results):
        check(result, row)


def test_a_request_is_the_same_alone_in_a_batch_and_with_its_prefix_cached(tp3: Server) -> None:
    count = 16
    with tp3.client() as client:
        alone = client.generate(**greedy(SUBJECT, count), cache_salt="alone")
        assert alone.usage.cached_tokens == 0
        check(alone, SUBJECT, count)
        again = client.generate(**greedy(SUBJECT, count), cache_salt="alone")
        assert again.usage.cached_tokens >= len(alone.prompt_ids) // 2
        check(again, SUBJECT, count)
    others: list[dict[str, Any]] = [greedy(row, count) for row in range(10)]
    drawn = [{"prompt_ids": ROWS[row]["prompt_ids"], **SAMPLED, "seed": row} for row in range(5)]
    batch = [*others, *drawn, greedy(SUBJECT, count)]
    assert len(batch) == 16
    *results, last = together(tp3, batch)
    check(last, SUBJECT, count)
    for row, result in enumerate(results[: len(others)]):
        check(result, row, count)


def test_a_seed_gives_the_same_answer_in_a_batch_and_in_another_layout(
    servers: dict[tuple[int, int], Server],
) -> None:
    request: dict[str, Any] = {"prompt_ids": ROWS[SUBJECT]["prompt_ids"], **SAMPLED}
    alone: dict[tuple[int, int], list[int]] = {}
    for of, server in servers.items():
        with server.client() as client:
            alone[of] = client.generate(**request).token_ids
            assert client.generate(**{**request, "seed": 8}).token_ids != alone[of]
    assert alone[3, 1] == alone[1, 2]
    crowd = [{"prompt_ids": ROWS[row]["prompt_ids"], **SAMPLED, "seed": 100 + row} for row in range(15)]
    *_, last = together(servers[3, 1], [*crowd, request])
    assert last.token_ids == alone[3, 1]


def test_text_in_and_text_out_through_the_command(tp3: Server, smollm2: Path) -> None:
    row = ROWS[6]
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=False)
    drawn = ("--name", tp3.name, "--temperature", "0", "--max-tokens", "32", "--logprobs", "1")
    found = tp3.place.tandem_json("run", "smollm2-135m", prompt, "--raw", *drawn)
    assert found["prompt_ids"] == row["prompt_ids"]
    assert found["token_ids"] == row["token_ids"][:32]
    assert found["text"] == tokenizer.decode(found["token_ids"])
    assert [scored["top_ids"] for scored in found["logprobs"]] == [[t] for t in found["token_ids"]]


def test_a_conversation_makes_sense(tp3: Server) -> None:
    with Client(tp3.name, runtime_directory=tp3.place.root) as client:
        asked = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat(asked, temperature=0.0, max_tokens=40)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
