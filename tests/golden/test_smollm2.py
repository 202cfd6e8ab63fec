"""SmolLM2-135M in float32 against transformers on the same GGUF (smollm2.json), ranks as threads.

Every layout answers all 20 prompts; one request is the same alone, among others, in chunks of 7
tokens and after preemption.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.topology import Topology
from tests.golden.harness import Driver, Job, run_ranks_as_threads

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("smollm2.json").read_text())
ROWS: list[dict[str, Any]] = GOLDEN["rows"]
NUM_TOKENS: int = GOLDEN["num_tokens"]
LAYOUTS = [(1, 1), (3, 1), (1, 2), (3, 2), (1, 4)]
TOLERANCE = 1e-3

MEMORY = {"num_blocks": 700, "block_tokens": 16, "context": 1024, "step_tokens": 512}


def job(row: dict[str, Any], **how: Any) -> Job:
    return Job(row["prompt_ids"], how.pop("max_tokens", NUM_TOKENS), **how)


def check(done: Job, row: dict[str, Any]) -> None:
    count = done.max_tokens
    assert done.output_ids == row["token_ids"][:count]
    worst = max(
        abs(scored.logprob - expected)
        for scored, expected in zip(done.logprobs, row["logprobs"][:count], strict=True)
    )
    assert worst < TOLERANCE


def test_the_golden_file_holds_what_was_asked() -> None:
    assert len(ROWS) >= 20
    assert NUM_TOKENS >= 64
    assert len({len(row["prompt_ids"]) for row in ROWS}) >= 12
    assert all(len(row["token_ids"]) == NUM_TOKENS for row in ROWS)
    # No row hangs on a tie that rounding could turn.
    assert min(margin for row in ROWS for margin in row["margins"]) > 1e-3


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_every_layout_answers_as_transformers(smollm2: Path, tp: int, pp: int) -> None:
    with run_ranks_as_threads(smollm2, Topology(tp=tp, pp=pp), **MEMORY) as instance:
        jobs = [job(row) for row in ROWS]
        Driver(instance, chunk=256, depth=pp + 1).run(jobs)
    for done, row in zip(jobs, ROWS, strict=True):
        check(done, row)


def test_one_request_is_the_same_however_it_is_run(smollm2: Path) -> None:
    subject, count = ROWS[16], 32
    with run_ranks_as_threads(smollm2, Topology(), **MEMORY) as instance:
        ways = {
            "alone": [job(subject, max_tokens=count)],
            "among others": [job(row, max_tokens=count) for row in ROWS[:15]]
            + [job(subject, max_tokens=count)],
            "preempted": [job(ROWS[4], max_tokens=40), job(subject, max_tokens=count, preempt_at=9)],
        }
        for jobs in ways.values():
            Driver(instance, depth=2).run(jobs)
        ways["chunked"] = [job(subject, max_tokens=count)]
        Driver(instance, chunk=7, depth=2).run(ways["chunked"])
    for way, jobs in ways.items():
        assert jobs[-1].output_ids == subject["token_ids"][:count], way
        check(jobs[-1], subject)


@pytest.mark.long
def test_the_golden_file_is_what_transformers_says_today(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for row in ROWS:
        ids = torch.tensor([row["prompt_ids"] + row["token_ids"]])
        with torch.inference_mode():
            scores = model(ids).logits[0].double().log_softmax(-1)
        start = len(row["prompt_ids"]) - 1
        predicted = scores[start : start + NUM_TOKENS]
        assert predicted.argmax(-1).tolist() == row["token_ids"]
        found = predicted.gather(1, torch.tensor(row["token_ids"])[:, None])[:, 0].tolist()
        assert found == pytest.approx(row["logprobs"], abs=TOLERANCE)
