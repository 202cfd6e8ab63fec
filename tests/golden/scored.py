"""What tests of tiny models share that hold the scores of every position, not those of answers alone."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from protocol.sampling import SamplingParams
from protocol.topology import Topology
from tests.golden.harness import Driver, Job, run_ranks_as_threads
from tests.golden.tiny import TOLERANCE
from tests.server import served
from tests.unit.text_models import byte_level

Answer = tuple[list[int], torch.Tensor]
"""Known tokens, prompt and greedy ones, and the log-probabilities after each, [tokens, vocabulary]."""

_SCORED = SamplingParams(temperature=0.0, seed=0, logprobs=8, prompt_logprobs=8)


def scored_answers(
    model: PreTrainedModel, prompt_lengths: tuple[int, ...], new_tokens: int
) -> list[Answer]:
    """Return greedy answers to random prompts, computed whole at each token."""
    generator = torch.Generator().manual_seed(7)
    answers = []
    with torch.inference_mode():
        for length in prompt_lengths:
            known = torch.randint(257, (length,), generator=generator).tolist()
            for _ in range(new_tokens):
                scores = model(input_ids=torch.tensor([known]), use_cache=False).logits[0].log_softmax(-1)
                known.append(int(scores[-1].argmax()))
            answers.append((known, scores))
    return answers


def check_answers(
    directory: Path,
    answers: list[Answer],
    topology: Topology,
    new_tokens: int,
    *,
    one_by_one: bool = False,
    num_blocks: int = 128,
    kv_groups: int = 1,
) -> None:
    """Hold the likeliest tokens of every position, and every greedy token, against the reference.

    Prompts whole, then in steps of 7 tokens with several in flight, and where asked one by one.
    """
    runs = [(64, 1), (7, topology.pp + 1), *([(1, 1)] if one_by_one else [])]
    with run_ranks_as_threads(directory, topology, num_blocks=num_blocks, kv_groups=kv_groups) as instance:
        for chunk, depth in runs:
            jobs = [
                Job(known[:-new_tokens], new_tokens, _SCORED, start_step=i % 3)
                for i, (known, _) in enumerate(answers)
            ]
            Driver(instance, chunk=chunk, depth=depth).run(jobs)
            for job, answer in zip(jobs, answers, strict=True):
                _check_positions(job, *answer)


def _check_positions(job: Job, known: list[int], scores: torch.Tensor) -> None:
    """Hold the greedy tokens, and at every position the token that came and the likeliest ones."""
    assert job.prompt_ids + job.output_ids == known
    found = [job.prompt_scores[p] for p in range(1, len(job.prompt_ids))] + job.logprobs
    assert len(found) == len(known) - 1
    for own, token, expected in zip(found, known[1:], scores, strict=False):
        ids = [token, *own.top_ids]
        assert [own.logprob, *own.top_logprobs] == pytest.approx(
            expected[ids].tolist(), rel=TOLERANCE, abs=TOLERANCE
        )


def prompt_errors(
    directory: Path,
    answers: list[Answer],
    topology: Topology,
    *,
    chunk: int,
    kv_dtype: str,
    num_blocks: int = 128,
) -> list[float]:
    """Return how far each known token's log-probability is from the reference's, all taken as prompts."""
    sampling = SamplingParams(temperature=0.0, seed=0, prompt_logprobs=0)
    jobs = [Job(known, 1, sampling) for known, _ in answers]
    with run_ranks_as_threads(directory, topology, kv_dtype=kv_dtype, num_blocks=num_blocks) as instance:
        Driver(instance, chunk=chunk).run(jobs)
    return [
        abs(found.logprob - float(scores[position - 1, known[position]]))
        for job, (known, scores) in zip(jobs, answers, strict=True)
        for position, found in job.prompt_scores.items()
    ]


def check_served(directory: Path, answers: list[Answer], new_tokens: int, name: str) -> None:
    """Hold tokens and their log-probabilities from two processes, asked one after another."""
    byte_level().save(str(directory / "tokenizer.json"))
    with (
        served(directory, "--tp", "2", "--memory", "2", name=name) as server,
        server.client() as client,
    ):
        for known, scores in answers:
            result = client.generate(
                prompt_ids=known[:-new_tokens],
                temperature=0.0,
                max_tokens=new_tokens,
                ignore_eos=True,
                logprobs=0,
            )
            assert result.token_ids == known[-new_tokens:]
            assert result.logprobs is not None
            found = [scored.logprob for scored in result.logprobs]
            expected = scores[-new_tokens:].max(-1).values.tolist()
            assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
