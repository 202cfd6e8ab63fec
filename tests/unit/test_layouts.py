"""The matrix of layouts against arithmetic by hand."""

import math
import time

import msgspec
import pytest

from models.known import known_model, known_names
from models.layout import check_degrees
from models.layouts import CLASS_SLACK, Asked, Matrix, lay_out
from models.machines import Gpu, Link, Machines, parse_gpus
from models.memory import DeviceOverheads, StepLimits, plan_memory
from models.parameter import DTYPE_BYTES, ParameterSpec, Segment
from models.registry import build_spec
from models.spec import ModelSpec
from models.speed import Decode
from protocol.errors import InvalidRequestError, LayoutError, MemoryBudgetError, UnknownModelError
from protocol.topology import Topology

GIB = 1 << 30
# Figures that divide well: 1 GB/s of memory, 1 GFLOP/s, 1 MB/s and 1 ms of link, 1 MB/s from the host.
LINK = Link("wire", 1e6, 1e-3)
GPU = Gpu("toy", GIB, 1e9, 1e9, LINK, 1e6)
NO_OVERHEADS = DeviceOverheads(
    runtime=1000,
    communicator_base=0,
    communicator_per_peer=0,
    workspace=500,
    logit_bytes=6,
    whole_logit_bytes=4,
)
LIMITS = StepLimits(max_rows=4, step_tokens=16, logit_rows=4, block_tokens=16)
CHECKPOINT = 10**6
DEFAULTS = Asked()
SLOW_DRIVE = Asked(drive_bytes_s=1e6)


def tiny() -> ModelSpec:
    """4 layers of 64 wide, 4 heads of 16 over 2, an MLP of 128, 256 words."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
    }
    return build_spec(config, "config.json", "bfloat16")


def toys(count: int) -> Machines:
    return Machines(GPU, 1, count, LINK)


def matrix(count: int, budget: int, asked: Asked = SLOW_DRIVE, model: ModelSpec | None = None) -> Matrix:
    return lay_out(model or tiny(), toys(count), budget, LIMITS, NO_OVERHEADS, asked, CHECKPOINT)


LAYER = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128)
"""Bytes of a layer's products in bfloat16."""
NORM = 2 * 64
HEAD = 2 * 256 * 64


def test_one_rank_by_hand() -> None:
    budget = 3_000_000
    found = matrix(1, budget)
    (layout,) = found.layouts
    norms = 9 * 512  # of 128 bytes each, in their alignment
    weights = 4 * LAYER + 2 * HEAD + norms
    activations = 16 * 2 * (3 * 64 + max(2 * 128 + 64, 3 * 128))
    logits = 4 * 10 * 256
    spent = weights + 1000 + 500 + activations + logits
    per_token = 4 * 2 * (16 + 16) * 2
    blocks = (budget - spent) // (16 * per_token)
    assert layout.weights_bytes_per_rank == weights
    assert layout.kv_bytes_per_rank == blocks * 16 * per_token
    assert layout.kv_tokens == blocks * 16
    assert found.context == 512
    assert layout.requests == blocks * 16 // 512
    assert (layout.tp, layout.pp, layout.ep, layout.dcp, layout.fits) == (1, 1, 1, 1, True)
    assert layout.stages == ((0, 4),)
    assert (found.best, layout.traffic) == (0, ())
    assert sum(line.predicted_bytes for line in layout.lines) == spent + layout.kv_bytes_per_rank


def test_speeds_of_one_rank_by_hand() -> None:
    layout = matrix(1, 3_000_000).layouts[0]
    read = 4 * LAYER + HEAD + 9 * NORM  # of the embedding, rows alone
    flops = read - 9 * NORM  # 2 a weight, and 2 bytes
    kv = 512 * 4 * 2 * 32 * 2
    assert layout.decode_one.weight_bytes == read
    assert layout.decode_one.kv_bytes == kv
    assert layout.decode_one.token_s == pytest.approx(max(read, flops) / 1e9 + kv / 1e9)
    many = layout.decode_many
    assert many.rows == min(64, layout.requests) > 1
    assert many.token_s == pytest.approx(many.rows * (flops + kv) / 1e9)
    assert many.tokens_s == pytest.approx(many.rows / many.token_s)
    attention = 4 * 2 * 4 * (16 + 16) * 512 * 256
    assert layout.first_token_s == pytest.approx((512 * flops + attention) / 1e9)
    copied = layout.weights_bytes_per_rank / 1e6
    assert layout.boot_s == pytest.approx(3.4 + copied)
    assert matrix(1, 3_000_000, Asked(drive_bytes_s=1e5)).layouts[0].boot_s == pytest.approx(10 + copied)


def test_a_groups_messages_by_hand() -> None:
    layout = matrix(2, 3_000_000, Asked(tp=2)).layouts[0]
    reduce, sample = layout.traffic
    assert (reduce.what, reduce.link, reduce.count) == ("all-reduce", "wire", 2 * 4 + 1)
    assert reduce.bytes_per_token == 9 * 2 * 64 * 2 // 2
    assert (sample.count, sample.bytes_per_token) == (1, 12)
    read = (4 * LAYER + HEAD) // 2 + 9 * NORM
    kv = 512 * 4 * 1 * 32 * 2
    sent = 10 * 1e-3 + (reduce.bytes_per_token + 12) / 1e6
    assert layout.decode_one.token_s == pytest.approx((read + kv) / 1e9 + sent)


def test_a_pipelines_steps_by_hand() -> None:
    asked = Asked(pp=2, concurrency=4, drive_bytes_s=1e6)
    layout = matrix(2, 3_000_000, asked).layouts[0]
    (next_stage, back) = layout.traffic
    assert (next_stage.what, next_stage.bytes_per_token) == ("to the next stage", 128)
    assert (back.what, back.bytes_per_token) == ("tokens to the first stage", 8)
    first, last = layout.stages
    assert (first[0], first[1], last[1]) == (0, last[0], 4)

    def stage_s(layers: int, head: bool, rows: int, message: int) -> float:
        read = layers * (LAYER + 2 * NORM) + head * (HEAD + NORM)
        whole = 4 * (LAYER + 2 * NORM) + HEAD + NORM
        flops = rows * (4 * LAYER + HEAD) * read / whole
        kv = rows * 512 * layers * 2 * 32 * 2
        return max(read, flops) / 1e9 + kv / 1e9 + 1e-3 + rows * message / 1e6

    def stages(rows: int) -> list[float]:
        return [
            stage_s(first[1], False, rows, 128),
            stage_s(last[1] - last[0], True, rows, 8),
        ]

    # One row passes through both stages; four are two batches, which the stages take in turn.
    assert layout.decode_one.token_s == pytest.approx(sum(stages(1)))
    assert layout.decode_many.rows == 4
    assert layout.decode_many.token_s == pytest.approx(max(sum(stages(2)), 2 * max(stages(2))))


def test_only_experts_that_are_hit_are_read() -> None:
    dense = tiny()
    experts = tuple(Segment(f"experts.{index}", (1000,)) for index in range(8))
    stacked = ParameterSpec("layers.0.experts_down", experts, "bfloat16", layer=0, stack=8)
    model = msgspec.structs.replace(dense, parameters=(*dense.parameters, stacked), experts_per_token=2)
    layout = matrix(1, 3_000_000, Asked(concurrency=2), model).layouts[0]
    always = matrix(1, 3_000_000).layouts[0].decode_one.weight_bytes
    assert layout.decode_one.weight_bytes == always + 16_000 * 2 // 8
    assert layout.decode_many.rows == 2
    assert layout.decode_many.weight_bytes == always + round(16_000 * (1 - 0.75**2))
    unsaid = msgspec.structs.replace(model, experts_per_token=0)
    assert matrix(1, 3_000_000, model=unsaid).layouts[0].decode_one.weight_bytes == always + 16_000


def test_a_prompt_multiplies_what_a_latent_becomes_and_no_more_than_a_window() -> None:
    model = tiny()
    (group,) = model.kv_groups

    def attention_s(**changes: int | str) -> float:
        changed = (msgspec.structs.replace(group, **changes),)
        cut = msgspec.structs.replace(model, kv_groups=changed)
        return matrix(1, 3_000_000, model=cut).layouts[0].first_token_s - products_s

    products_s = 0.0
    whole, twice = attention_s(), attention_s(computed_dims=64)
    assert twice - whole == pytest.approx(4 * 2 * 4 * 32 * 512 * 256 / 1e9)
    products_s = 2 * whole - twice
    assert attention_s(kind="sliding", window=64) == pytest.approx(4 * 2 * 4 * 32 * 512 * 64 / 1e9)
    # Of a chunk a token sees half.
    assert attention_s(kind="chunked", window=64) == pytest.approx(4 * 2 * 4 * 32 * 512 * 32 / 1e9)


def test_the_tightest_rank_is_shown_and_all_degrees_multiply_to_the_gpus() -> None:
    model = tiny()
    for count in (1, 2, 4):
        found = matrix(count, 2_000_000)
        assert {(layout.tp, layout.pp) for layout in found.layouts} == {
            (tp, count // tp) for tp in range(1, count + 1) if count % tp == 0
        }
        for layout in found.layouts:
            if layout.dcp > 1:
                continue  # Its buffers alone are more than these toys have.
            planned = plan_memory(
                model,
                Topology(layout.tp, layout.pp),
                [2_000_000] * count,
                LIMITS,
                NO_OVERHEADS,
                None,
            )
            assert layout.kv_tokens == planned.kv_tokens
            assert layout.lines == planned.ranks[layout.rank].lines
            assert layout.rank == planned.tightest.rank


@pytest.mark.parametrize("context", [None, 512])
def test_what_does_not_fit_says_by_how_much(context: int | None) -> None:
    asked = Asked(context=context)
    found = matrix(2, 100_000, asked)
    assert found.best is None
    assert "nothing fits" in found.why
    for layout in found.layouts:
        assert not layout.fits
        assert layout.lacks_bytes > 0
        enough = 100_000 + layout.lacks_bytes
        alone = Asked(context=context, tp=layout.tp, pp=layout.pp)
        assert matrix(2, enough, alone).layouts[0].fits
        # Stages may be cut in another way for another budget, so that only one group's bound is sharp.
        if layout.pp == 1:
            assert not matrix(2, enough - 1, alone).layouts[0].fits
            assert layout.weights_bytes_per_rank < enough
    assert [layout.lacks_bytes for layout in found.layouts] == sorted(
        layout.lacks_bytes for layout in found.layouts
    )


@pytest.mark.parametrize("gpus", ["8xH100-80GB", "2x8xH100", "16xA100-40GB", "4xH200"])
@pytest.mark.parametrize("prefer", ["latency", "throughput"])
def test_the_best_has_the_most_tokens_of_its_class(gpus: str, prefer: str) -> None:
    found = known("llama-3.3-70b", gpus, Asked(prefer=prefer))  # type: ignore[arg-type]
    assert found.best == 0

    def cost(layout_decode: tuple[Decode, Decode]) -> float:
        return layout_decode[0].token_s if prefer == "latency" else 1 / layout_decode[1].tokens_s

    fitting = [layout for layout in found.layouts if layout.fits]
    costs = {layout.name: cost((layout.decode_one, layout.decode_many)) for layout in fitting}
    # Positions kept apart take no layout out of its class.
    for layout in fitting:
        whole = str(Topology(layout.tp, layout.pp, layout.ep))
        costs[layout.name] = min(costs[layout.name], costs.get(whole, math.inf))
    of_class = [x for x in fitting if costs[x.name] <= CLASS_SLACK * min(costs.values())]
    assert found.layouts[0].kv_tokens == max(layout.kv_tokens for layout in of_class)
    assert found.layouts[0] in of_class
    assert found.layouts[0].name in found.why
    fits = [layout.fits for layout in found.layouts]
    assert fits == sorted(fits, reverse=True)


def test_impossible_degrees_say_which_would_do() -> None:
    smol = known("smollm2-135m", "8xH100")
    assert [(layout.tp, layout.pp) for layout in smol.layouts] == [(1, 8)]
    assert {(refused.tp, refused.pp) for refused in smol.refused} == {(8, 1), (4, 2), (2, 4)}
    assert all(refused.why.endswith("1, 3, 9") for refused in smol.refused)
    for asked, told in (
        (Asked(tp=3), "3 does not divide 8 GPUs; degrees that do: 1, 2, 4, 8"),
        (Asked(pp=16), "16 does not divide 8 GPUs; degrees that do: 1, 2, 4, 8"),
        (Asked(tp=4, pp=1), "give tp 4 pp 2, or tp 8 pp 1"),
        (Asked(tp=8), "by tp 1, 3, 9 and pp up to 30"),
    ):
        with pytest.raises(LayoutError, match=told):
            known("smollm2-135m", "8xH100", asked)
    with pytest.raises(LayoutError, match="by tp 1, 3, 9 and pp up to 30"):
        known("smollm2-135m", "64xH100")


def test_a_context_that_does_not_fit_says_what_would() -> None:
    found = known("llama-3.3-70b", "2xH100", Asked(context=131072))
    assert found.best is None
    best = found.layouts[0]
    assert 0 < best.kv_tokens < 131072
    assert f"{best.name} is nearest, holds {best.kv_tokens:,} tokens and lacks " in found.why
    assert found.why.endswith("or a smaller --context")
    assert known("llama-3.3-70b", "2xH100", Asked(context=best.kv_tokens)).best == 0


def test_bad_demands() -> None:
    with pytest.raises(InvalidRequestError, match="the model has 8192"):
        known("llama-3-8b", "H200", Asked(context=8193))
    with pytest.raises(InvalidRequestError, match="ask for 1 to that"):
        known("llama-3-8b", "H200", Asked(context=0))
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InvalidRequestError, match="reads nothing"):
            known("llama-3-8b", "H200", Asked(drive_bytes_s=rate))


def known(name: str, gpus: str, asked: Asked = DEFAULTS, memory: int | None = None) -> Matrix:
    from orchestrator.planner import plan_layouts, subject

    return plan_layouts(subject(name, None, "bfloat16", "auto"), parse_gpus(gpus), memory, asked)


def test_llama_3_8b_on_an_h200_is_what_was_measured_there() -> None:
    """Within 1 % of the GPU of what the ranks found, in total and for KV (budget 139.61 GiB)."""
    layout = known("llama-3-8b", "1xH200").layouts[0]
    lines = {line.name: line.predicted_bytes / GIB for line in layout.lines}
    assert layout.budget_bytes / GIB == pytest.approx(139.61, abs=0.01)
    assert layout.weights_bytes_per_rank / GIB == pytest.approx(14.96, abs=0.01)
    assert layout.kv_bytes_per_rank / GIB == pytest.approx(122.40, rel=0.01)
    assert layout.kv_tokens == pytest.approx(1_002_304, rel=0.01)
    measured = {"runtime": 0.80, "activations": 1.15, "logits": 0.19, "workspace": 0.04}
    one_percent = 139.8 / 100
    assert sum(abs(lines[name] - value) for name, value in measured.items()) < one_percent
    assert sum(lines.values()) == pytest.approx(14.96 + 122.40 + sum(measured.values()), abs=one_percent)
    assert layout.decode_one.token_s < 4.1e-3


def test_memory_of_a_smaller_gpu_may_be_asked_for() -> None:
    small = known("llama-3-8b", "1xH200", memory=int(79.4 * GIB)).layouts[0]
    assert small.budget_bytes == int(79.4 * GIB)
    with pytest.raises(MemoryBudgetError, match=r"200.00 GiB were asked, a H200-141GB has 139.80"):
        known("llama-3-8b", "1xH200", memory=200 * GIB)


@pytest.mark.parametrize("name", known_names())
def test_the_tensors_of_a_known_model_are_those_published(name: str) -> None:
    published = known_model(name)
    model = build_spec(published.config, name, "bfloat16")
    shapes = {s.source: (s.shape, p.dtype) for p in model.parameters for s in p.segments}
    total = sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in shapes.values())
    assert total == published.tensor_bytes - published.skipped_bytes
    assert published.source.startswith("https://huggingface.co/")
    check_degrees(model, Topology())


def test_every_known_model_can_be_pulled_by_its_name() -> None:
    from loader.catalogue import KNOWN

    assert set(known_names()) <= set(KNOWN)
    with pytest.raises(UnknownModelError, match=r"llama-3-8b, llama-3\.1-8b"):
        known_model("mystery")


@pytest.mark.parametrize("name", known_names())
def test_the_arithmetic_of_any_known_model_is_quick(name: str) -> None:
    seconds = []
    for _ in range(3):
        # Processor time: whatever else runs beside this.
        started = time.process_time()
        known(name, "2x8xH100")
        seconds.append(time.process_time() - started)
    # A whole command has a second, half of it for the start; 0.13 were found here.
    assert min(seconds) < 0.3
