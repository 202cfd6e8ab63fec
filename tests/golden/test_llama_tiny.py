"""Tiny random Llamas over every layout, held against transformers on the same files.

Models are made here with a fixed seed by ``save_pretrained``; odd sizes make every rule of the cuts
work: 257 vocabulary rows and 90 inner features divide by nothing.
"""

import gc
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from protocol.sampling import SamplingParams
from protocol.topology import Topology
from tests.golden.harness import Driver, Job, run_ranks_as_threads
from tests.golden.tiny import NEW_TOKENS, TOLERANCE, Reference, answers_of, check, jobs_of, run_layout

LAYOUTS = [(1, 1), (8, 1), (2, 3)]
"""Besides those that the matrix takes (test_matrix.py)."""
LONG_LAYOUTS = [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2), (4, 2), (4, 3), (8, 2), (8, 3)]
BFLOAT16_BOUND = 0.1
"""Log-probability, against the float32 reference, from which transformers in bfloat16 is 0.05 away."""

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@lru_cache
def tiny(root: Path, kv_heads: int, rope: str = "default", *, tied: bool = False) -> tuple[Path, Reference]:
    """Return a model directory and its greedy answers: (prompt, tokens, log-probabilities)."""
    directory = root / f"{kv_heads}-{rope}-{tied}"
    torch.manual_seed(kv_heads)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=90,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=12,
        max_position_embeddings=256,
        rope_parameters=dict(ROPES[rope]),
        tie_word_embeddings=tied,
        initializer_range=0.15,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return directory, answers_of(model)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_layout_matches_transformers(root: Path, kv_heads: int, tp: int, pp: int) -> None:
    run_layout(*tiny(root, kv_heads), tp, pp)


@pytest.mark.long
@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS + LONG_LAYOUTS)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_matches_transformers(
    root: Path, kv_heads: int, tp: int, pp: int, rope: str, tied: bool
) -> None:
    run_layout(*tiny(root, kv_heads, rope, tied=tied), tp, pp)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_rope_and_tied_variants_match_transformers(
    root: Path, rope: str, tied: bool, tp: int, pp: int
) -> None:
    run_layout(*tiny(root, 2, rope, tied=tied), tp, pp)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_a_row_is_the_same_alone_and_in_a_batch(root: Path, tp: int, pp: int) -> None:
    directory, reference = tiny(root, 2)
    with run_ranks_as_threads(directory, Topology(tp, pp)) as instance:
        together = jobs_of(reference)
        Driver(instance, depth=pp + 1).run(together)
        for job in together:
            alone = Job(job.prompt_ids, NEW_TOKENS)
            Driver(instance, seed=None).run([alone])
            assert alone.output_ids == job.output_ids
            assert [one.logprob for one in alone.logprobs] == pytest.approx(
                [one.logprob for one in job.logprobs], rel=1e-5, abs=2e-5
            )


def test_many_chunk_sizes_and_a_preemption_change_nothing(root: Path) -> None:
    directory, reference = tiny(root, 4)
    with run_ranks_as_threads(directory, Topology(2, 2), block_tokens=5) as instance:
        for chunk in (1, 2, 5, 13):
            jobs = jobs_of(reference)
            for job in jobs[::2]:
                job.preempt_at = 4
            Driver(instance, chunk=chunk, depth=3, seed=chunk).run(jobs)
            check(jobs, reference)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 3)])
def test_layers_in_several_kv_groups_go_by_their_tables(root: Path, tp: int, pp: int) -> None:
    directory, reference = tiny(root, 2)
    with run_ranks_as_threads(directory, Topology(tp, pp), kv_groups=2) as instance:
        jobs = jobs_of(reference)
        Driver(instance, chunk=7, depth=pp + 1).run(jobs)
        check(jobs, reference)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_prompt_logprobs_match_transformers(root: Path, tp: int, pp: int) -> None:
    directory, reference = tiny(root, 2)
    model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager")
    sampling = SamplingParams(temperature=0.0, seed=0, logprobs=0, prompt_logprobs=2)
    jobs = [Job(prompt, 2, sampling) for prompt, _, _ in reference]
    with run_ranks_as_threads(directory, Topology(tp, pp), logit_rows=4) as instance:
        Driver(instance, chunk=7).run(jobs)
    for job in jobs:
        with torch.inference_mode():
            scores = model(torch.tensor([job.prompt_ids])).logits[0].log_softmax(-1)
        assert sorted(job.prompt_scores) == list(range(1, len(job.prompt_ids)))
        for position, found in job.prompt_scores.items():
            token = job.prompt_ids[position]
            assert found.token_id == token
            assert found.logprob == pytest.approx(float(scores[position - 1, token]), abs=TOLERANCE)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 1), (2, 3)])
def test_bfloat16_stays_within_its_bound(root: Path, tp: int, pp: int) -> None:
    directory, reference = tiny(root, 2)
    model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager")
    sampling = SamplingParams(temperature=0.0, seed=0, prompt_logprobs=0)
    jobs = [Job(prompt, 1, sampling) for prompt, _, _ in reference]
    with run_ranks_as_threads(directory, Topology(tp, pp), dtype="bfloat16") as instance:
        Driver(instance, chunk=16).run(jobs)
    for job in jobs:
        with torch.inference_mode():
            scores = model(torch.tensor([job.prompt_ids])).logits[0].log_softmax(-1)
        for position, found in job.prompt_scores.items():
            expected = float(scores[position - 1, job.prompt_ids[position]])
            assert abs(found.logprob - expected) < BFLOAT16_BOUND


def kv_descriptors() -> int:
    """Count the KV memories that this process has open."""
    found = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(one).startswith("/memfd:tandem-kv") for one in found)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 3)])
def test_a_ranks_memory_goes_with_it(root: Path, tp: int, pp: int) -> None:
    gc.collect()
    gc.disable()  # Nothing may hold itself.
    try:
        before = kv_descriptors()
        with run_ranks_as_threads(tiny(root, 2)[0], Topology(tp, pp)) as instance:
            Driver(instance).run([Job([1, 2, 3], NEW_TOKENS)])
            assert kv_descriptors() == before + tp * pp
        assert kv_descriptors() == before
    finally:
        gc.enable()
