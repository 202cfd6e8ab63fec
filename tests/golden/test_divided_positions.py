"""Layouts that keep KV by position (DCP): tiny models against transformers, and what memory they save.

Of 2 KV heads tp 4 and 8 have 2 and 4 copies to divide; of one head, or one latent, all ranks of a group.
Blocks are scattered, and pieces small enough that both ways to the context are taken.
"""

from pathlib import Path

import pytest

from protocol.topology import Topology
from tests.golden import test_deepseek_tiny, test_llama_tiny, test_qwen3_tiny
from tests.golden.harness import Driver, Job, run_ranks_as_threads
from tests.golden.test_kv_dtype import BOUNDS, NEW_TOKENS, SCORED, prompts
from tests.golden.tiny import check, jobs_of, run_layout
from tests.server import served
from tests.unit.text_models import byte_level
from worker.backends import cpu_divided

LAYOUTS = [(2, 8, 1, 4), (2, 8, 2, 2), (1, 2, 2, 2)]
"""KV heads, tp, pp, dcp."""
LONG_LAYOUTS = [
    *((2, tp, pp, dcp) for tp, dcp in [(4, 2), (8, 2), (8, 4)] for pp in (1, 2, 3)),
    *((1, tp, pp, dcp) for tp in (2, 4, 8) for dcp in (2, 4, 8) if tp % dcp == 0 for pp in (1, 2, 3)),
]
LATENT_LAYOUTS = [(4, 2, 4), (8, 1, 2)]
LONG_LATENT_LAYOUTS = [
    (tp, pp, dcp) for tp in (2, 4, 8) for dcp in (2, 4, 8) if tp % dcp == 0 for pp in (1, 2, 3)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("divided")


@pytest.mark.parametrize(("kv_heads", "tp", "pp", "dcp"), LAYOUTS)
def test_heads_match_transformers(root: Path, kv_heads: int, tp: int, pp: int, dcp: int) -> None:
    run_layout(*test_llama_tiny.tiny(root, kv_heads), tp, pp, dcp=dcp)


@pytest.mark.parametrize(("kv_heads", "tp", "pp", "dcp"), LAYOUTS[:1])
def test_heads_with_norms_match_transformers(root: Path, kv_heads: int, tp: int, pp: int, dcp: int) -> None:
    run_layout(*test_qwen3_tiny.dense(root, kv_heads), tp, pp, dcp=dcp)


@pytest.mark.parametrize(("tp", "pp", "dcp"), LATENT_LAYOUTS)
def test_latents_match_transformers(root: Path, tp: int, pp: int, dcp: int) -> None:
    test_deepseek_tiny.check_layout(root, "deepseek", tp, pp, dcp=dcp)


def test_divided_positions_and_placed_experts_match_transformers(root: Path) -> None:
    test_deepseek_tiny.check_layout(root, "kimi", 4, 2, ep=4, dcp=4)


@pytest.mark.parametrize("divided_bytes", [1, 3000])
def test_pieces_of_any_size_change_nothing(
    root: Path, divided_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_divided, "DIVIDED_BYTES", divided_bytes)
    run_layout(*test_llama_tiny.tiny(root, 1), 4, 1, dcp=4)
    test_deepseek_tiny.check_layout(root, "deepseek", 4, 1, dcp=4)


def test_a_preemption_and_any_chunk_change_nothing(root: Path) -> None:
    directory, reference = test_llama_tiny.tiny(root, 2)
    with run_ranks_as_threads(directory, Topology(4, 2, dcp=2), block_tokens=6) as instance:
        for chunk in (1, 2, 5, 13):
            jobs = jobs_of(reference)
            for job in jobs[::2]:
                job.preempt_at = 4
            Driver(instance, chunk=chunk, depth=3, seed=chunk).run(jobs)
            check(jobs, reference)


@pytest.mark.parametrize("kv_dtype", ["float8", "bfloat16"])
@pytest.mark.parametrize("model", ["llama", "deepseek"])
@pytest.mark.parametrize("chunk", [7, 64])
def test_kv_in_fewer_bits_is_what_one_rank_keeps(root: Path, kv_dtype: str, model: str, chunk: int) -> None:
    """Codes are a token's own, so divided pages hold what whole ones do: the same but for rounding."""
    directory = test_llama_tiny.tiny(root, 2)[0]
    if model == "deepseek":
        directory = test_deepseek_tiny.tiny(root, "dense")[0]
    found = {}
    for dcp, dtype in ((1, "auto"), (1, kv_dtype), (2, kv_dtype)):
        jobs = [Job(prompt, NEW_TOKENS, SCORED) for prompt in prompts(root)]
        with run_ranks_as_threads(directory, Topology(4, dcp=dcp), kv_dtype=dtype) as instance:
            Driver(instance, chunk=chunk).run(jobs)
        found[dcp, dtype] = [one.logprob for job in jobs for _, one in sorted(job.prompt_scores.items())]

    def errors(a: list[float], b: list[float]) -> list[float]:
        return [abs(one - other) for one, other in zip(a, b, strict=True)]

    between = errors(found[2, kv_dtype], found[1, kv_dtype])
    exact = errors(found[2, kv_dtype], found[1, "auto"])
    assert 0 < max(exact) < BOUNDS[kv_dtype]
    assert sum(between) / len(between) < sum(exact) / len(exact) / 4


def test_processes_answer_as_transformers(root: Path) -> None:
    directory, answers = test_deepseek_tiny.tiny(root, "kimi")
    byte_level().save(str(directory / "tokenizer.json"))
    asked = ("--tp", "4", "--dcp", "2", "--memory", "4")
    with served(directory, *asked, name="divided") as server, server.client() as client:
        for known, scores in answers:
            count = test_deepseek_tiny.NEW_TOKENS
            result = client.generate(
                prompt_ids=known[:-count], temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=0
            )
            assert result.token_ids == known[-count:]
            assert result.logprobs is not None
            found = [scored.logprob for scored in result.logprobs]
            expected = scores[-count:].max(-1).values.tolist()
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
        # The longest prompt's whole blocks, pages of both ranks, are found again.
        again = client.generate(
            prompt_ids=known[:-count], temperature=0.0, max_tokens=count, ignore_eos=True
        )
        assert again.usage.cached_tokens == (len(known) - count) // 16 * 16 > 0
        assert again.token_ids == known[-count:]


@pytest.mark.long
@pytest.mark.parametrize(("kv_heads", "tp", "pp", "dcp"), LONG_LAYOUTS)
def test_every_layout_of_heads_matches_transformers(
    root: Path, kv_heads: int, tp: int, pp: int, dcp: int
) -> None:
    run_layout(*test_llama_tiny.tiny(root, kv_heads), tp, pp, dcp=dcp)
    run_layout(*test_qwen3_tiny.dense(root, kv_heads), tp, pp, dcp=dcp)


@pytest.mark.long
@pytest.mark.parametrize("variant", test_deepseek_tiny.CHANGES)
@pytest.mark.parametrize(("tp", "pp", "dcp"), LONG_LATENT_LAYOUTS)
def test_every_layout_of_latents_matches_transformers(
    root: Path, variant: str, tp: int, pp: int, dcp: int
) -> None:
    test_deepseek_tiny.check_layout(root, variant, tp, pp, dcp=dcp)
