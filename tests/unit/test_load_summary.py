"""Load plans of known models in figures, and ``tandem plan --loading``."""

import json
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

import cli
from loader.index import read_index
from loader.load_summary import LoadSummary, stated_checkpoint, summarise
from loader.plan import BLOCK_BYTES, plan_load
from models.known import known_model
from models.layout import arena
from models.registry import build_spec, load_spec
from models.spec import ModelSpec
from protocol.topology import Topology
from tests.tiny_llama import write_tiny_llama
from tests.unit.test_loader_plan import even_stages


def model_of(name: str) -> ModelSpec:
    return build_spec(known_model(name).config, name, "bfloat16", "auto")


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("llama-3-8b", Topology(tp=8)),
        ("llama-3-8b", Topology(tp=2, pp=4)),
        ("smollm2-135m", Topology(tp=3, pp=2)),
        ("qwen3-30b-a3b", Topology(tp=4, pp=2)),
        ("qwen3-30b-a3b", Topology(tp=8, ep=8)),
        ("llama-4-scout", Topology(tp=8)),
        ("kimi-k2.5", Topology(tp=8, ep=8)),
    ],
    ids=str,
)
def test_loads_of_known_models(name: str, topology: Topology) -> None:
    """No byte twice, shares of a stage's ranks equal within 1 %, files read forwards."""
    model = model_of(name)
    checkpoint = stated_checkpoint(model)
    stages = even_stages(model.num_layers, topology.pp)
    plan = plan_load(model, checkpoint, topology, stages)
    summary = summarise(plan, 28e9)
    needed = sum(tensor.length for tensor in checkpoint.tensors.values())
    assert summary.read_bytes == needed == known_model(name).tensor_bytes - known_model(name).skipped_bytes
    assert summary.seconds == pytest.approx(needed / 28e9)
    spans = sorted((r.file, r.offset, r.offset + r.length) for mine in plan.reads for r in mine)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(spans))
    for stage in range(topology.pp):
        shares = [summary.ranks[rank].read_bytes for rank in topology.tp_group(stage)]
        assert max(shares) <= 1.01 * min(shares)
    for rank, mine in enumerate(plan.reads):
        assert [(r.file, r.offset) for r in mine] == sorted((r.file, r.offset) for r in mine)
        assert max(r.length for r in mine) <= BLOCK_BYTES
        found = summary.ranks[rank]
        assert found.runs <= found.reads == len(mine)
        assert found.straight_bytes + found.for_others_bytes > 0
    written = sum(
        p.size for rank in range(topology.world_size) for p in [arena(model, topology, stages, rank)]
    )
    assert summary.exchanged_bytes < written


def test_a_single_rank_reads_long_runs_straight() -> None:
    model = model_of("llama-3-8b")
    checkpoint = stated_checkpoint(model)
    summary = summarise(plan_load(model, checkpoint, Topology(), (range(32),)), 1e9)
    (rank,) = summary.ranks
    assert rank.runs == summary.files == 2
    assert rank.straight_bytes == rank.read_bytes == 16_060_522_496
    assert rank.read_bytes / rank.reads > 0.9 * BLOCK_BYTES
    assert summary.exchanged_bytes == 0
    assert summary.uneven == 0


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.main, ["plan", "--loading", *words])


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_tiny_llama(tmp_path / "tiny", layers=4)


def test_the_plan_of_a_directory(tiny: Path) -> None:
    said = invoke("--model", str(tiny), "--tp", "2", "--pp", "2", "--drive-gbs", "2", "--json")
    assert said.exit_code == 0, said.output
    found = json.loads(said.output)
    assert found["layout"] == {"tp": 2, "pp": 2, "ep": 1, "dcp": 1}
    summary = msgspec.convert(found["loading"], LoadSummary)
    wanted = {s.source for p in load_spec(tiny).parameters for s in p.segments}
    tensors = read_index(tiny).tensors
    assert summary.read_bytes == sum(tensors[name].length for name in wanted)
    assert summary.drive_bytes_s == 2e9
    assert len(summary.ranks) == 4
    shown = invoke("--model", str(tiny), "--tp", "2", "--pp", "2").output
    assert "tp 2 pp 2: " in shown
    assert "each byte read once" in shown
    assert (
        len([line for line in shown.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"], ["3"])]) == 4
    )


def test_the_plan_on_gpus_that_are_not_here(tiny: Path) -> None:
    said = invoke("--model", "llama-3-8b", "--gpus", "2xH100-80GB", "--tp", "2", "--json")
    assert said.exit_code == 0, said.output
    assert json.loads(said.output)["loading"]["read_bytes"] == 16_060_522_496


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "llama-3-8b", "--gpus", "2x8xH100-80GB"], "plan one"),
        (["--model", "kimi-k2.5", "--gpus", "H100-80GB"], "fits"),
        (["--model", "TINY", "--drive-gbs", "0"], "reads nothing"),
        (["--model", "nowhere/none"], "tandem pull"),
    ],
)
def test_refusals(words: list[str], message: str, tiny: Path) -> None:
    said = invoke(*[str(tiny) if word == "TINY" else word for word in words])
    assert said.exit_code == 1
    assert message in said.output
