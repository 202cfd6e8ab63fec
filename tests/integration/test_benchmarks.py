"""Benchmarks give figures of what they say, and end what they start."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks import control_plane, gpu_serve, llama_8b_on_h200
from benchmarks import figures as figures_module
from benchmarks.byte_tokenizer import write_byte_tokenizer
from benchmarks.figures import Demand, Figure
from benchmarks.known_models import KNOWN, name_of
from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.token_times import StreamTimes, steady_window, step_figures
from loader.index import check_against, read_index
from models.registry import load_spec
from tests.server import Place, served
from tests.tiny_llama import write_tiny_llama


def test_the_control_plane_is_measured_with_real_parts(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path)
    found = control_plane.measure(model, ranks=3, rows=8, connections=2, max_tokens=40, idle_s=0.5)
    assert found["tokens"] == 8 * 40
    # Every row wants a token in nearly every step, and nothing is planned for nobody.
    assert 40 <= found["steps"] + 1 <= 80
    assert 0 < found["step_us"]["median"] <= found["step_us"]["p99"] < 1e6
    assert 0 < found["cpu_us_per_token"] < 20_000
    assert found["idle_percent"] < 20


def test_a_demand_that_is_not_met_is_named() -> None:
    slow = {"rows": 256, "cpu_us_per_token": 13.0, "step_us": {"median": 1200.0}, "idle_percent": 0.5}
    assert [text.split()[0] for text in control_plane.missed(slow)] == ["cpu_us_per_token", "step_us"]
    assert control_plane.missed(slow | {"rows": 64}) == []


def test_a_checkpoint_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    size = write_checkpoint("tiny", whole, seed=1, threads=1)
    # A tensor has more elements than a shard has bytes: shards of one tensor each.
    write_checkpoint("tiny", cut, seed=1, threads=2, shard_bytes=1000)
    write_checkpoint("tiny", other, seed=2, layers=1)
    spec = load_spec(whole, "bfloat16")
    checkpoint = read_index(whole)
    check_against(spec, checkpoint)
    check_against(spec, read_index(cut))
    check_against(load_spec(other, "bfloat16"), read_index(other))
    assert {t.dtype for t in checkpoint.tensors.values()} == {"BF16"}
    assert sum(t.length for t in checkpoint.tensors.values()) == size
    names = list(checkpoint.tensors)
    assert content(whole, names) == content(cut, names)
    shared = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert content(whole, shared) != content(other, shared)
    with pytest.raises(FileExistsError):
        write_checkpoint("tiny", whole)


def content(directory: Path, names: list[str]) -> list[bytes]:
    checkpoint = read_index(directory)
    found = []
    for name in names:
        tensor = checkpoint.tensors[name]
        with open(checkpoint.path_of(tensor), "rb") as file:
            file.seek(tensor.offset)
            found.append(file.read(tensor.length))
    return found


def test_weights_are_normal_and_let_activations_through(tmp_path: Path) -> None:
    write_checkpoint("tiny", tmp_path, seed=3, dtype="float32")
    shapes = {name: t.shape for name, t in read_index(tmp_path).tensors.items()}
    for name, shape in shapes.items():
        values = np.frombuffer(content(tmp_path, [name])[0], np.float32).reshape(shape)
        if "norm" in name:
            assert (values == 1).all()
            continue
        draws = values.ravel() * np.sqrt(shape[-1])
        error = 5 / np.sqrt(draws.size)
        assert abs(draws.mean()) < error
        assert abs(draws.std() - 1) < error
        assert abs((abs(draws) < 1).mean() - 0.6827) < error


def test_bfloat16_is_the_nearest_to_float32(tmp_path: Path) -> None:
    write_checkpoint("tiny", tmp_path / "32", dtype="float32", layers=1)
    write_checkpoint("tiny", tmp_path / "16", dtype="bfloat16", layers=1)
    name = "model.layers.0.mlp.down_proj.weight"
    exact = torch.frombuffer(bytearray(content(tmp_path / "32", [name])[0]), dtype=torch.float32)
    rounded = torch.frombuffer(bytearray(content(tmp_path / "16", [name])[0]), dtype=torch.bfloat16)
    assert torch.equal(exact.bfloat16(), rounded)


def test_a_made_model_with_its_tokenizer_is_served(tmp_path: Path) -> None:
    write_checkpoint("tiny", tmp_path, tokenizer=True)
    with served(tmp_path) as server, server.client() as client:
        first, second = (
            client.generate("some text", max_tokens=12, temperature=0.0, ignore_eos=True) for _ in range(2)
        )
    assert len(first.token_ids) == 12
    assert first.token_ids == second.token_ids
    assert first.text == second.text
    assert first.text


def test_every_id_of_a_made_tokenizer_has_its_own_text(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path / "tokenizer.json", 1000, (7, 999))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1000
    assert len({tokenizer.id_to_token(token_id) for token_id in range(1000)}) == 1000
    assert tokenizer.decode([7, 999]) == ""
    assert tokenizer.decode(tokenizer.encode("héllo wörld").ids) == "héllo wörld"


def test_the_whole_system_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_checkpoint("tiny", tmp_path, tokenizer=True)
    load = gpu_serve.Load(
        rows=(1, 3),
        prompt_tokens=16,
        answer_tokens=24,
        repeats=1,
        prefill_prompts=2,
        prefill_tokens=300,
        mixed_rows=2,
        mixed_prompts=2,
        mixed_prompt_tokens=200,
        mixed_lead_s=0.3,
        mixed_interval_s=0.05,
        mixed_chunk=64,
        idle_s=0.3,
    )
    with Place() as place:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(place.path))
        measurement = gpu_serve.Measurement(tmp_path, "cpu", load, ("--memory", "1"))
        measurement.run(gpu_serve.PARTS)
        assert place.running() == []
    figures, raw = measurement.figures, measurement.raw
    found = {figure.name: figure.value for figure in figures}
    assert 0 < found["decode step, 1 request"] < 1000
    assert 0 < found["decode step, 3 requests"] <= found["decode gap p99, 3 requests"]
    assert raw["decode"][3][0]["workers_percent"] > raw["decode"][3][0]["orchestrator_percent"] > 0
    assert found["CPU in decode, 1 request"] > 5 * found["CPU idle"]
    assert found["prefill, 2 x 300"] > 0
    assert found["mixed p99 / pure step"] > 0
    assert 0 < found["KV cache"] < 1
    assert found["KV tokens"] > 0
    # Nothing is demanded of this model.
    assert figures_module.missed(figures) == []
    printed = figures_module.table(figures).splitlines()
    assert len(printed) == len(figures) + 1
    data = json.loads(figures_module.as_data(figures, {"gpu": None}))
    assert [one["name"] for one in data["figures"]] == list(found)


def test_steps_are_read_from_when_tokens_come() -> None:
    even = StreamTimes(0.0, tuple((1 + 0.01 * k, 1) for k in range(11)))
    # Two tokens at once, after a stall.
    stalled = StreamTimes(0.0, ((1.02, 1), (1.03, 1), (1.07, 2), (1.08, 1), (1.2, 1)))
    window = steady_window([even, stalled])
    assert window[0] == pytest.approx(1.02)
    assert window[1] == pytest.approx(1.1)
    found = step_figures([stalled], window)
    assert found["tokens"] == 4
    assert found["step_ms"] == pytest.approx(15)
    assert found["step_mean_ms"] == pytest.approx(15)
    assert found["merged"] == 0.5
    assert found["gap_p99_ms"] == pytest.approx(40, rel=0.02)
    assert found["tokens_per_s"] == pytest.approx(4 / 0.06)
    assert step_figures([even, even], window)["tokens_per_s"] == pytest.approx(200)
    late = StreamTimes(0.0, ((2.0, 1), (2.1, 1)))
    with pytest.raises(ValueError, match="ask for more tokens"):
        steady_window([even, late])


def test_a_figure_says_what_it_reaches_and_meets() -> None:
    step = Figure(name="step", value=5.0, unit="ms", demand=Demand(ceiling=4.0, must=5.0, aim=4.5))
    rate = Figure(name="rate", value=5.0, unit="1/s", higher_is_better=True, demand=step.demand)
    slow = Figure(name="slow", value=6.0, unit="ms", demand=Demand(must=5.0))
    assert (step.ratio, step.verdict) == (0.8, "must")
    assert (rate.ratio, rate.verdict) == (1.25, "aim")
    assert slow.ratio is None
    assert figures_module.missed([step, rate, slow]) == ["slow: 6.00 ms, must be 5.00"]


def test_the_8b_model_is_known_and_its_ceilings_are(tmp_path: Path) -> None:
    config = dict(KNOWN["llama-3-8b"]) | {"torch_dtype": "bfloat16"}
    assert name_of(config) == "llama-3-8b"
    assert name_of(config | {"num_hidden_layers": 4}) is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_spec(tmp_path, "bfloat16")
    assert llama_8b_on_h200.weight_bytes(spec) == 2 * 8_030_261_248
    # 15.01 GB of weights and, a request, 192 tokens of 128 KiB, at 4.66 TB/s.
    assert llama_8b_on_h200.decode_ceiling_ms(spec, 1, 192) == pytest.approx(3.226, abs=0.01)
    # The matrix products of 256 rows compute for longer than they read.
    assert llama_8b_on_h200.decode_ceiling_ms(spec, 256, 192) == pytest.approx(4.895 + 1.383, abs=0.02)
