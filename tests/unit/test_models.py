"""Cuts, layouts, stages and the memory plan against straight arithmetic."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layout import ALIGNMENT, arena, check_degrees, cut_stages, stage_bytes
from models.memory import CPU_OVERHEADS, MemoryPlan, StepLimits, plan_memory
from models.parameter import Cut, share
from models.registry import load_spec
from models.spec import ModelSpec
from protocol.errors import (
    LayoutError,
    MemoryBudgetError,
    ModelFormatError,
    StorageError,
    TandemError,
    UnsupportedModelError,
)
from protocol.topology import Topology

SMOL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
LIMITS = StepLimits(max_rows=64, step_tokens=512, logit_rows=64, block_tokens=16)
GIB = 1 << 30


def spec_of(tmp_path: Path, **changes: Any) -> ModelSpec:
    (tmp_path / "config.json").write_text(json.dumps(SMOL | changes))
    return load_spec(tmp_path)


@given(
    units=st.integers(1, 200),
    tp=st.integers(1, 16),
    replicate=st.booleans(),
    pad=st.booleans(),
)
def test_shares_cover_every_unit(units: int, tp: int, replicate: bool, pad: bool) -> None:
    cut = Cut(dim=0, unit="head", replicate=replicate, pad=pad)
    try:
        shares = [share(units, tp, rank, cut) for rank in range(tp)]
    except LayoutError:
        assert units % tp
        assert not pad
        assert not (replicate and tp % units == 0)
        return
    held = [unit for s in shares for unit in range(s.start, s.end)]
    assert sorted(set(held)) == list(range(units))
    assert len({s.room for s in shares}) == 1
    assert all(s.end - s.start <= s.room for s in shares)
    copies = tp // units if units < tp and replicate and tp % units == 0 else 1
    assert all(held.count(unit) == copies for unit in range(units))
    assert held == sorted(held)


@pytest.mark.parametrize("tp", [1, 3, 9])
def test_pieces_of_all_ranks_rebuild_every_tensor(tmp_path: Path, tp: int) -> None:
    model = spec_of(tmp_path)
    for parameter in model.parameters:
        seen: dict[str, set[int]] = {}
        for rank in range(tp):
            local = parameter.local_shape(Topology(tp))
            for piece in parameter.pieces(Topology(tp), rank):
                assert piece.destination + piece.end - piece.start <= local[piece.dim]
                seen.setdefault(piece.source, set()).update(range(piece.start, piece.end))
        for segment in parameter.segments:
            extent = segment.shape[parameter.cut.dim if parameter.cut else 0]
            assert seen[segment.source] == set(range(extent))


def test_bytes_of_smollm2(tmp_path: Path) -> None:
    model = spec_of(tmp_path)
    layer = 576 * 576 * 2 + 2 * 192 * 576 + 3 * 576 * 1536 + 2 * 576
    padding = 61 * (-(-4 * 576 // ALIGNMENT) * ALIGNMENT - 4 * 576)  # of 61 norms
    assert stage_bytes(model, Topology(), range(30)) == 4 * (49152 * 576 + 30 * layer + 576) + padding
    assert model.kv_groups[0].bytes_per_token(Topology(3), range(30)) == 30 * 1 * 128 * 4
    assert model.kv_groups[0].bytes_per_token(Topology(9), range(30)) == 30 * 1 * 128 * 4
    assert model.flops_per_token == 2 * (30 * (layer - 2 * 576) + 576 * 49152)


def test_tied_head_shares_bytes_on_one_stage_and_has_its_own_on_another(tmp_path: Path) -> None:
    model = spec_of(tmp_path)
    whole = arena(model, Topology(), (range(30),), 0)
    by_name = {p.spec.name: p for p in whole.placed}
    assert by_name["head"].is_alias
    assert by_name["head"].offset == by_name["embedding"].offset
    stages = (range(15), range(15, 30))
    last = arena(model, Topology(pp=2), stages, 1)
    assert not {p.spec.name: p for p in last.placed}["head"].is_alias


@settings(max_examples=40, deadline=None)
@given(tp=st.sampled_from([1, 3, 9]), pp=st.integers(1, 6), budget=st.integers(0, 4 * GIB))
def test_arenas_are_exact_and_stages_whole(
    tmp_path_factory: pytest.TempPathFactory, tp: int, pp: int, budget: int
) -> None:
    model = spec_of(tmp_path_factory.mktemp("m"))
    topology = Topology(tp=tp, pp=pp)
    stages = cut_stages(model, topology, budget)
    assert [layer for stage in stages for layer in stage] == list(range(30))
    assert all(len(stage) > 0 for stage in stages)
    for rank in range(topology.world_size):
        laid = arena(model, topology, stages, rank)
        assert laid.size == stage_bytes(model, Topology(tp), stages[topology.stage(rank)])
        end = 0
        for placed in laid.placed:
            assert placed.offset % ALIGNMENT == 0
            if not placed.is_alias:
                assert placed.offset == end
                end += -(-placed.spec.local_bytes(Topology(tp)) // ALIGNMENT) * ALIGNMENT
        assert end == laid.size


def brute_force(model: ModelSpec, pp: int, budget: int) -> float:
    """Most KV tokens that any cut into stages gives its tightest stage."""

    def tokens(layers: range) -> float:
        per_token = sum(g.bytes_per_token(Topology(), layers) for g in model.kv_groups)
        return (budget - stage_bytes(model, Topology(), layers)) / per_token

    def best(start: int, parts: int) -> float:
        if parts == 1:
            return tokens(range(start, model.num_layers))
        return max(
            min(tokens(range(start, end)), best(end, parts - 1))
            for end in range(start + 1, model.num_layers - parts + 2)
        )

    return best(0, pp)


@settings(max_examples=20, deadline=None)
@given(
    layers=st.integers(3, 7),
    pp=st.integers(2, 3),
    vocab=st.sampled_from([64, 5000, 60000]),
    budget=st.integers(1 << 20, 1 << 28),
)
def test_stages_are_cut_for_the_most_kv(
    tmp_path_factory: pytest.TempPathFactory, layers: int, pp: int, vocab: int, budget: int
) -> None:
    model = spec_of(tmp_path_factory.mktemp("m"), num_hidden_layers=layers, vocab_size=vocab)
    stages = cut_stages(model, Topology(pp=pp), budget)
    one = Topology()
    least = min(
        (budget - stage_bytes(model, one, s)) / model.kv_groups[0].bytes_per_token(one, s) for s in stages
    )
    best = brute_force(model, pp, budget)
    assert least >= best - 0.02 * abs(best) - 1e-6


def plan(model: ModelSpec, topology: Topology, gib: float, context: int | None = None) -> MemoryPlan:
    budgets = [int(gib * GIB)] * topology.world_size
    return plan_memory(model, topology, budgets, LIMITS, CPU_OVERHEADS, context)


def test_the_plan_never_goes_over_its_budget_and_leaves_less_than_a_block(tmp_path: Path) -> None:
    model = spec_of(tmp_path)
    for topology in (Topology(), Topology(tp=3), Topology(pp=4), Topology(tp=3, pp=2)):
        made = plan(model, topology, 1.25)
        for rank in made.ranks:
            total = sum(line.predicted_bytes for line in rank.lines)
            assert total <= rank.budget_bytes < total + rank.block_bytes
        assert made.num_blocks == made.tightest.kv_bytes // made.tightest.block_bytes
        assert made.kv_tokens == made.num_blocks * 16


def test_a_context_that_does_not_fit_is_fitted_or_refused_with_figures(tmp_path: Path) -> None:
    model = spec_of(tmp_path)
    fitted = plan(model, Topology(), 1.05)
    assert fitted.context < 8192
    assert fitted.note is not None
    with pytest.raises(MemoryBudgetError) as refusal:
        plan(model, Topology(), 1.05, context=8192)
    assert str(fitted.context) in refusal.value.message
    needed = float(refusal.value.message.split("give it ")[1].split()[0])
    assert plan(model, Topology(), needed, context=8192).context == 8192
    with pytest.raises(MemoryBudgetError):
        plan(model, Topology(), 4, context=8193)


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=3, pp=2)])
@pytest.mark.parametrize("context", [None, 4096])
def test_what_is_advised_is_enough_where_not_even_the_weights_fit(
    tmp_path: Path, topology: Topology, context: int | None
) -> None:
    model = spec_of(tmp_path)
    with pytest.raises(MemoryBudgetError) as refusal:
        plan(model, topology, 0.2, context)
    needed = float(refusal.value.message.split("give it ")[1].split()[0])
    assert plan(model, topology, needed, context).kv_tokens >= (context or 1)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (18, 1), (1, 31)])
def test_impossible_degrees_say_what_would_do(tmp_path: Path, tp: int, pp: int) -> None:
    with pytest.raises(LayoutError) as refusal:
        check_degrees(spec_of(tmp_path), Topology(tp=tp, pp=pp))
    if tp > 1:
        assert refusal.value.message.endswith("1, 3, 9")
    assert refusal.value.field in ("tp", "pp")


BAD: list[tuple[dict[str, Any], type[TandemError], str]] = [
    ({"hidden_size": "x"}, ModelFormatError, "config.json"),
    ({"hidden_size": 0}, ModelFormatError, "hidden_size"),
    ({"num_key_value_heads": 2}, ModelFormatError, "num_key_value_heads"),
    ({"hidden_size": 577}, ModelFormatError, "head_dim"),
    ({"head_dim": 7}, ModelFormatError, "head_dim"),
    ({"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act"),
    ({"attention_bias": True}, UnsupportedModelError, "attention_bias"),
    ({"architectures": []}, ModelFormatError, "architectures"),
    ({"architectures": ["Mystery"]}, UnsupportedModelError, "architectures"),
    ({"rope_scaling": {"rope_type": "spiral"}}, UnsupportedModelError, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ModelFormatError, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "big"}}, ModelFormatError, "factor"),
    ({"rope_parameters": {"rope_theta": True}}, ModelFormatError, "rope_theta"),
]


@pytest.mark.parametrize(("change", "kind", "field"), BAD)
def test_bad_configurations(
    tmp_path: Path, change: dict[str, Any], kind: type[TandemError], field: str
) -> None:
    with pytest.raises(kind) as refusal:
        spec_of(tmp_path, **change)
    assert refusal.value.field == field


def test_unreadable_configurations(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        load_spec(tmp_path)
    for content in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelFormatError):
            load_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMOL))
    with pytest.raises(UnsupportedModelError):
        load_spec(tmp_path, "float8")


@given(tp=st.integers(1, 9), pp=st.integers(1, 9))
def test_topology_is_a_bijection(tp: int, pp: int) -> None:
    topology = Topology(tp=tp, pp=pp)
    ranks = range(topology.world_size)
    assert [topology.rank(topology.stage(r), topology.tp_rank(r)) for r in ranks] == list(ranks)
    assert [r for r in ranks if topology.is_first(r)] == list(topology.tp_group(0))
    assert [r for r in ranks if topology.is_last(r)] == list(topology.tp_group(pp - 1))
    assert topology.sampling_rank in topology.tp_group(pp - 1)
