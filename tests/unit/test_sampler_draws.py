"""The sampler against its naive twin, on random rows, in every layout."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.control import NewRow, TokenLogprobs
from protocol.sampling import SamplingParams
from protocol.topology import Topology
from tests.unit import sampler_twin as twin
from tests.unit.comm_layouts import on_all_ranks
from worker.comm import Communicator
from worker.sampler import NonFiniteLogitsError, RowSampling, Sampled, Sampler

SEEDS = st.integers(0, 2**63 - 1)
# On a grid ties are common; its sums are exact, so that the twin's order of adding cannot matter.
GRID = st.integers(-24, 24).map(lambda n: n / 4)


@dataclass(frozen=True)
class Row:
    params: SamplingParams
    prompt: list[int]
    output: list[int]
    banned: list[int]
    banned_until: int

    def state(self) -> RowSampling:
        return RowSampling(self.params, self.prompt, self.output, self.banned, self.banned_until)

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)

    def adjusted(self, logits: np.ndarray) -> np.ndarray:
        return twin.adjusted(
            logits, self.params, self.prompt, self.output, self.banned, self.position < self.banned_until
        )


def shard(logits: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """This rank's columns; those past the vocabulary hold what a careless matrix product may leave."""
    tp, vocab = comm.topology.tp, logits.shape[1]
    room = -(-vocab // tp)
    padded = torch.full((len(logits), room * tp), 1e30)
    padded[:, :vocab] = logits
    place = comm.topology.tp_rank(comm.rank)
    return padded[:, place * room : (place + 1) * room].contiguous()


def sample(logits: torch.Tensor, rows: list[Row], tp: int = 1, logit_rows: int = 2) -> Sampled:
    """Return what all ranks agree on."""

    def work(comm: Communicator) -> Sampled:
        sampler = Sampler(logits.shape[1], comm, logit_rows)
        mine = shard(logits, comm)
        before = mine.clone()
        found = sampler.sample(mine, [row.state() for row in rows], [row.position for row in rows])
        assert torch.equal(mine, before)
        return found

    first, *others = on_all_ranks(Topology(tp=tp), work)
    assert all(other == first for other in others)
    return first


def plain_row(**params: object) -> Row:
    return Row(SamplingParams(**{"seed": 7, **params}), [0], [], [], 0)  # type: ignore[arg-type]


@st.composite
def rows_of(draw: st.DrawFn, vocab: int) -> Row:
    token = st.integers(0, vocab - 1)
    sometimes = st.booleans()
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 100.0])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.5, 1e-9])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, vocab - 1, vocab, vocab + 9])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 2.0, 0.5, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25, 2.0])),
        logit_bias=draw(st.dictionaries(token, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=3)),
        seed=draw(SEEDS),
        logprobs=draw(st.sampled_from([None, 0, 1, 5])),
    )
    return Row(
        params,
        draw(st.lists(token, min_size=1, max_size=6)),
        draw(st.lists(token, max_size=6)) if draw(sometimes) else [],
        draw(st.lists(token, max_size=vocab)) if draw(sometimes) else [],
        draw(st.integers(0, 12)),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[Row]]:
    vocab = draw(st.integers(1, 23))
    rows = draw(st.lists(rows_of(vocab), min_size=1, max_size=5))
    logits = draw(st.lists(GRID, min_size=vocab * len(rows), max_size=vocab * len(rows)))
    return torch.tensor(logits).view(len(rows), vocab), rows


def check_logprobs(found: TokenLogprobs, logits: np.ndarray, token: int, k: int) -> None:
    exact = twin.log_probabilities(logits)
    order = sorted(range(len(exact)), key=lambda i: (-exact[i], i))[:k]
    assert (found.token_id, found.top_ids) == (token, order)
    np.testing.assert_allclose([found.logprob, *found.top_logprobs], exact[[token, *order]], atol=1e-6)


def check_against_twin(logits: torch.Tensor, rows: list[Row], tp: int) -> None:
    found = sample(logits, rows, tp)
    for i, row in enumerate(rows):
        raw = logits[i].numpy()
        expected = twin.draw(row.adjusted(raw), row.params, row.position)
        assert found.token_ids[i] == expected, row
        logprobs = found.logprobs[i]
        assert (logprobs is None) == (row.params.logprobs is None)
        if logprobs is not None:
            check_logprobs(logprobs, raw, expected, row.params.logprobs or 0)


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 4))
def test_every_combination_equals_the_twin(batch: tuple[torch.Tensor, list[Row]], tp: int) -> None:
    check_against_twin(*batch, tp)


@pytest.mark.long
@settings(max_examples=5000, deadline=None)
@given(batches(), st.integers(1, 4))
def test_every_combination_equals_the_twin_long(batch: tuple[torch.Tensor, list[Row]], tp: int) -> None:
    check_against_twin(*batch, tp)


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 6.0])
def test_a_large_vocabulary_equals_the_twin(spread: float, tp: int) -> None:
    # Flat rows need more candidates than a filter first looks at; spread 0 is all ties.
    torch.manual_seed(1)
    params = [{}, {"top_p": 0.95}, {"top_p": 0.3, "top_k": 900}, {"min_p": 0.2}, {"temperature": 0.0}]
    rows = [plain_row(logprobs=20, seed=seed, **p) for seed, p in enumerate(params)]
    check_against_twin(torch.randn(len(rows), 5003) * spread, rows, tp)


def test_a_seed_gives_the_same_token_in_any_batch_and_layout() -> None:
    torch.manual_seed(2)
    rows = [plain_row(seed=seed, top_p=0.8 if seed % 3 == 0 else 1.0) for seed in range(12)]
    logits = torch.randn(12, 301)
    alone = [sample(logits[i : i + 1], [row]).token_ids[0] for i, row in enumerate(rows)]
    assert len(set(alone)) > 3
    for tp in (1, 2, 3, 4):
        order = torch.randperm(12).tolist()
        found = sample(logits[order], [rows[i] for i in order], tp, logit_rows=3).token_ids
        assert found == [alone[i] for i in order]


@pytest.mark.parametrize("tp", [1, 3])
def test_edges(tp: int) -> None:
    vocab = 10
    logits = torch.arange(vocab, dtype=torch.float32).repeat(9, 1)
    logits[0] = torch.tensor([3e38, -3e38] * 5)
    logits[7, 4] = float("-inf")
    rows = [
        plain_row(temperature=1e-5, top_k=2),
        plain_row(temperature=1e-5),
        plain_row(top_p=1e-300),
        plain_row(top_k=10**9),
        plain_row(logit_bias={0: 100.0}),
        plain_row(logit_bias={9: -100.0, 8: -100.0}, temperature=0.0),
        Row(SamplingParams(seed=1), [1], [], [i for i in range(vocab) if i != 6], 2),
        plain_row(temperature=0.0, logprobs=20),
        Row(SamplingParams(seed=1, temperature=0.0), [1], [], list(range(vocab)), 2),
    ]
    found = sample(logits, rows, tp)
    assert found.token_ids[0] in (0, 2)
    assert found.token_ids[1:3] == [9, 9]
    assert found.token_ids[4:] == [0, 7, 6, 9, 9]
    seventh = found.logprobs[7]
    assert seventh is not None
    assert len(seventh.top_ids) == vocab
    assert seventh.top_logprobs[-1] == -math.inf
    check_against_twin(logits[1:7], rows[1:7], tp)


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"repetition_penalty": 2.0}])
def test_a_damaged_row_is_an_error_that_names_it(tp: int, bad: float, params: dict[str, float]) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 5] = bad
    with pytest.raises(NonFiniteLogitsError) as caught:
        sample(logits, [plain_row(**params)] * 3, tp)
    assert caught.value.rows == [1]


def test_a_row_without_any_logit_is_an_error() -> None:
    logits = torch.full((2, 4), -math.inf)
    logits[0] = 0.0
    with pytest.raises(NonFiniteLogitsError, match=r"rows \[1\]"):
        sample(logits, [plain_row(temperature=0.0)] * 2)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("k", [0, 3, 20])
def test_prompt_scores_equal_the_twin(tp: int, k: int) -> None:
    torch.manual_seed(k)
    logits = torch.randint(-8, 8, (5, 11)) / 4.0
    tokens = [0, 10, 5, 3, 7]
    found = on_all_ranks(Topology(tp=tp), lambda c: Sampler(11, c, 5).score(shard(logits, c), tokens, k))
    assert all(other == found[0] for other in found)
    for i, token in enumerate(tokens):
        check_logprobs(found[0][i], logits[i].numpy(), token, k)


def test_damaged_prompt_scores_are_an_error() -> None:
    logits = torch.zeros(2, 6)
    logits[1, 5] = math.nan
    with pytest.raises(NonFiniteLogitsError, match=r"rows \[1\]"):
        on_all_ranks(Topology(tp=2), lambda c: Sampler(6, c, 2).score(shard(logits, c), [0, 1], 1))


def test_no_rows_cost_nothing() -> None:
    def work(comm: Communicator) -> None:
        sampler = Sampler(6, comm, 2)
        assert sampler.sample(torch.empty(0, 3), [], []) == Sampled([], [])
        assert sampler.score(torch.empty(0, 3), [], 2) == []

    on_all_ranks(Topology(tp=2), work)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_appended_tokens_count_like_those_of_a_row_that_begins_again(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 40))
    tokens = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=60))
    prompt = data.draw(st.integers(1, len(tokens)))
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        seed=0,
    )

    def new_row(known: int) -> RowSampling:
        return RowSampling.from_new_row(NewRow(0, tokens[:known], prompt, 0, ([],), params, [], 0))

    grown, fresh = new_row(prompt), new_row(len(tokens))
    for token in tokens[prompt:]:
        grown.append(token)
    logits = torch.linspace(-3, 3, vocab)
    found = grown.adjusted(logits, 0, vocab, len(tokens))
    assert torch.equal(found, fresh.adjusted(logits, 0, vocab, len(tokens)))
    expected = twin.adjusted(logits.numpy(), params, tokens[:prompt], tokens[prompt:], [], False)
    np.testing.assert_array_equal(found.numpy(), expected)
