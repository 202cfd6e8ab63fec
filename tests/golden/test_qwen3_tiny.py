"""Tiny random Qwen3 and Qwen3-MoE over layouts, held against transformers on the same files.

Odd sizes make every rule of the cuts work: 90 and 22 inner features and 257 vocabulary rows do not
divide by 4 or 8. Norm weights are random, or a missing norm could not be told from one of ones.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from protocol.sampling import SamplingParams
from protocol.topology import Topology
from tests.golden.harness import Driver, Job, run_ranks_as_threads
from tests.golden.tiny import (
    NEW_TOKENS,
    TOLERANCE,
    Reference,
    answers_of,
    force_split,
    let_products_add,
    run_layout,
)
from tests.server import served, until
from tests.unit.text_models import byte_level
from tests.unit.text_models import directory as write_text_files

LAYOUTS = [(1, 1), (4, 2)]
"""Besides those that the matrix takes (test_matrix.py)."""
LONG_LAYOUTS = [(2, 1), (4, 1), (8, 1), (1, 2), (1, 3), (2, 2), (8, 2), (2, 3), (4, 3)]

SHARED: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 90,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "initializer_range": 0.15,
    "attn_implementation": "eager",
}
MOES: dict[str, dict[str, Any]] = {
    "all sparse": {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True},
    "some sparse": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    },
    "one choice": {"num_experts": 5, "num_experts_per_tok": 1, "norm_topk_prob": False},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def saved(model: PreTrainedModel, directory: Path) -> Reference:
    """Give norms random weights, write the model, and return its answers."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return answers_of(model.eval())


@lru_cache
def dense(root: Path, kv_heads: int, *, tied: bool = False) -> tuple[Path, Reference]:
    directory = root / f"dense-{kv_heads}-{tied}"
    torch.manual_seed(kv_heads)
    config = Qwen3Config(**SHARED, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    return directory, saved(Qwen3ForCausalLM(config), directory)


@lru_cache
def moe(root: Path, kv_heads: int, kind: str, vocab_size: int = 257) -> tuple[Path, Reference]:
    directory = root / f"moe-{kv_heads}-{kind}-{vocab_size}"
    torch.manual_seed(kv_heads)
    config = Qwen3MoeConfig(
        **SHARED | {"vocab_size": vocab_size},
        **MOES[kind],
        num_key_value_heads=kv_heads,
        moe_intermediate_size=22,
        experts_implementation="eager",
    )
    return directory, saved(Qwen3MoeForCausalLM(config), directory)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_dense_layouts_match_transformers(root: Path, kv_heads: int, tp: int, pp: int) -> None:
    run_layout(*dense(root, kv_heads), tp, pp)


@pytest.mark.parametrize(("kv_heads", "kind"), [(4, "all sparse"), (2, "some sparse"), (1, "one choice")])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_mixtures_match_transformers(root: Path, kv_heads: int, kind: str, tp: int, pp: int) -> None:
    run_layout(*moe(root, kv_heads, kind), tp, pp)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("pp", [1, 3])
def test_a_block_may_have_added_its_sum(
    root: Path, pp: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense blocks and mixtures, whose sum is always pending."""
    let_products_add(monkeypatch, every)
    run_layout(*dense(root, 2), 1, pp)
    run_layout(*moe(root, 2, "some sparse"), 1, pp)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize(
    ("tp", "pp", "kind"),
    [
        (2, 1, "some sparse"),
        (4, 2, "all sparse"),
    ],
)
def test_placed_experts_match_transformers(
    root: Path, tp: int, pp: int, kind: str, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_split(monkeypatch, is_split=is_split)
    run_layout(*moe(root, 2, kind), tp, pp, ep=tp)


@pytest.mark.parametrize("is_split", [False, True])
def test_placed_experts_and_divided_positions_match_transformers(
    root: Path, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_split(monkeypatch, is_split=is_split)
    run_layout(*moe(root, 2, "all sparse"), 8, 1, ep=8, dcp=4)


@pytest.mark.long
@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS + LONG_LAYOUTS)
@pytest.mark.parametrize("kind", ["dense", "tied", *MOES])
def test_every_layout_matches_transformers(root: Path, kv_heads: int, tp: int, pp: int, kind: str) -> None:
    if kind in MOES:
        run_layout(*moe(root, kv_heads, kind), tp, pp)
    else:
        run_layout(*dense(root, kv_heads, tied=kind == "tied"), tp, pp)


def test_tied_embeddings_match_transformers(root: Path) -> None:
    run_layout(*dense(root, 2, tied=True), 2, 2)


def test_the_files_have_the_published_names(root: Path) -> None:
    with safe_open(moe(root, 2, "some sparse")[0] / "model.safetensors", "pt") as opened:
        names = set(opened.keys())
    assert "model.layers.3.mlp.experts.5.down_proj.weight" in names
    assert "model.layers.3.mlp.gate.weight" in names
    assert "model.layers.1.mlp.gate_proj.weight" in names


@pytest.mark.parametrize("tp", [1, 2])
def test_a_step_of_more_than_one_chunk_scores_every_position_alike(
    root: Path, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, reference = moe(root, 4, "all sparse")
    model = Qwen3MoeForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager"
    )
    monkeypatch.setattr("worker.layers.moe.CHUNK_TOKENS", 16)
    sampling = SamplingParams(temperature=0.0, seed=0, logprobs=0, prompt_logprobs=0)
    jobs = [Job(prompt, 1, sampling) for prompt, _, _ in reference]
    with run_ranks_as_threads(directory, Topology(tp)) as instance:
        Driver(instance, chunk=64).run(jobs)
    for job in jobs:
        with torch.inference_mode():
            scores = model(torch.tensor([job.prompt_ids])).logits[0].log_softmax(-1)
        assert sorted(job.prompt_scores) == list(range(1, len(job.prompt_ids)))
        for position, found in job.prompt_scores.items():
            expected = float(scores[position - 1, job.prompt_ids[position]])
            assert found.logprob == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("degrees", [("--tp", "2", "--pp", "2"), ("--tp", "4", "--ep", "4")])
def test_a_mixture_is_served_by_processes(root: Path, degrees: tuple[str, ...]) -> None:
    tokenizer = byte_level()
    directory, reference = moe(root, 2, "all sparse", -(-tokenizer.get_vocab_size() // 16) * 16)
    write_text_files(directory, tokenizer=tokenizer)
    with served(directory, *degrees, "--memory", "2") as server, server.client() as client:
        for prompt, token_ids, logprobs in reference[-2:]:
            result = client.generate(
                prompt_ids=prompt, temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0
            )
            assert result.token_ids == token_ids
            assert result.logprobs is not None
            found = [scored.logprob for scored in result.logprobs]
            assert found == pytest.approx(logprobs, abs=TOLERANCE)
        # Every token but an answer's last is computed once, and chooses 4 experts in each layer.
        stats = client.stats()
        choices = 4 * (stats.prompt_tokens + stats.completion_tokens - stats.finished)
        until(lambda: [one.tokens for one in client.stats().experts] == [choices] * 4)
        counted = client.stats().experts
        assert [one.layer for one in counted] == [0, 1, 2, 3]
        assert all(1 <= one.imbalance <= 16 and 0 <= one.busiest < 16 for one in counted)
