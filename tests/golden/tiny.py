"""What tests of tiny models share: the reference's greedy answers, and how ranks are held to them."""

from itertools import count
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from protocol.topology import Topology
from tests.golden.harness import Driver, Job, run_ranks_as_threads
from worker.backends.base import Weight
from worker.backends.cpu import CpuBackend
from worker.comm import Communicator

PROMPT_LENGTHS = (1, 3, 7, 8, 18, 45)
NEW_TOKENS = 10
TOLERANCE = 1e-4

Reference = list[tuple[list[int], list[int], list[float]]]
"""Of each request: its prompt, the tokens that follow and their log-probabilities."""


def answers_of(model: PreTrainedModel) -> Reference:
    """Return greedy answers to prompts of ``PROMPT_LENGTHS``, computed whole at each token."""
    generator = torch.Generator().manual_seed(7)
    answers = []
    with torch.inference_mode():
        for length in PROMPT_LENGTHS:
            prompt = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
            answers.append((prompt, *_greedy(model, prompt)))
    return answers


def _greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    known, logprobs = list(prompt), []
    for _ in range(NEW_TOKENS):
        scores = model(torch.tensor([known])).logits[0, -1].log_softmax(-1)
        known.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return known[len(prompt) :], logprobs


def jobs_of(reference: Reference) -> list[Job]:
    """Return the requests, which begin at different steps."""
    return [Job(prompt, NEW_TOKENS, start_step=i % 3) for i, (prompt, _, _) in enumerate(reference)]


def check(jobs: list[Job], reference: Reference) -> None:
    """Require the reference's tokens, and its log-probabilities within ``TOLERANCE``."""
    for job, (prompt, token_ids, logprobs) in zip(jobs, reference, strict=True):
        assert job.prompt_ids == prompt
        assert job.output_ids == token_ids
        assert [one.logprob for one in job.logprobs] == pytest.approx(logprobs, abs=TOLERANCE)
        assert [one.token_id for one in job.logprobs] == token_ids


def let_products_add(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Have every so many-th product that ends a block added to the residual at once, as on a GPU."""
    turns = count()

    def linear_update(
        self: CpuBackend, residual: torch.Tensor, x: torch.Tensor, weight: Weight, comm: Communicator
    ) -> torch.Tensor | None:
        assert comm.topology.tp == 1
        product = self.linear(x, weight)
        if next(turns) % every:
            return product
        residual.add_(product)
        return None

    monkeypatch.setattr(CpuBackend, "linear_update", linear_update)


def run_layout(directory: Path, reference: Reference, tp: int, pp: int, ep: int = 1, dcp: int = 1) -> None:
    """Hold one layout to the reference: prompts whole, then in chunks of 7 with several steps in flight."""
    with run_ranks_as_threads(directory, Topology(tp, pp, ep, dcp)) as instance:
        for chunk, depth in ((64, 1), (7, pp + 1)):
            jobs = jobs_of(reference)
            Driver(instance, chunk=chunk, depth=depth).run(jobs)
            check(jobs, reference)


def force_split(monkeypatch: pytest.MonkeyPatch, *, is_split: bool) -> None:
    """Have layers of placed experts take every step in one form, by at most 8 tokens at a time."""
    monkeypatch.setattr("worker.layers.moe.splits_tokens", lambda *_, **__: is_split)
    for module in ("moe", "expert_exchange"):
        monkeypatch.setattr(f"worker.layers.{module}.CHUNK_TOKENS", 8)
