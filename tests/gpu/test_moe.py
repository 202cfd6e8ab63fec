"""Experts on a GPU: routing as the CPU's, and sums against float64 references with every kind of weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from models.moe import Routing
from tests.gpu.poison import load_kernels, poison_new_tensors
from worker.backends.base import ExpertWeights, Int4Weight, Routed
from worker.backends.cpu_moe import route
from worker.backends.cuda.grouped_table import PLAIN_COLUMNS, VARIANTS, columns_for, most_tiles

pytestmark = pytest.mark.gpu

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
BOUND = {BFLOAT16: 6e-3, FLOAT32: 1e-5}
"""Of ‖got - want‖ / ‖want‖. In bf16 three roundings lie between: gate and up, their product, the output."""
TOKENS = (1, 2, 3, 7, 63, 64, 65, 1000)

ROUTINGS = {
    "one of 16": Routing(16, 1, scores="sigmoid", weighs="input"),
    "8 of 128": Routing(128, 8, normalize=True),
    "8 of 384": Routing(384, 8, scores="sigmoid", normalize=True, scale=2.827, has_bias=True),
    "groups": Routing(
        256, 8, scores="sigmoid", normalize=True, scale=2.5, groups=8, top_groups=4, has_bias=True
    ),
    "16 of 512": Routing(512, 16),
    "all of 4": Routing(4, 4, groups=2, top_groups=2),
    "groups of two": Routing(24, 3, scores="sigmoid", groups=12, top_groups=5, has_bias=True),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    kernels = load_kernels(tmp_path_factory.mktemp("kernels"))
    from worker.backends.cuda.elementwise import Elementwise
    from worker.backends.cuda.linear import Linear

    torch.set_float32_matmul_precision("highest")
    return kernels, Linear(kernels), Elementwise(kernels)


@pytest.fixture
def make(parts: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    from worker.backends.cuda.moe import CudaExperts

    poison_new_tensors(monkeypatch)
    return lambda weights, routing: CudaExperts(*parts, weights, routing)


def drawn(*shape: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).to(dtype)


def packed(*shape: int, scales: torch.dtype = BFLOAT16) -> Int4Weight:
    *rows, k = shape
    words = torch.randint(-(1 << 31), 1 << 31, (*rows, k // 8), device="cuda").int()
    factors = torch.rand(*rows, k // 32, device="cuda") + 0.5
    return Int4Weight(words, (factors / (4 * k**0.5)).to(scales))


def wide(weight: torch.Tensor | Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """The float64 twin: of int4, code - 8 times scale, rounded where the products are in bf16."""
    if not isinstance(weight, Int4Weight):
        return weight.double()
    shifts = 4 * torch.arange(8, dtype=torch.int32, device="cuda")
    codes = (weight.words.unsqueeze(-1) >> shifts & 15).flatten(-2) - 8
    found = codes.double() * weight.scales.double().repeat_interleave(32, -1)
    return found.to(dtype).double() if dtype == BFLOAT16 else found


def reference(x: torch.Tensor, weights: ExpertWeights, routed: Routed, weighs: str) -> torch.Tensor:
    """Expert by expert in float64, with the roundings of the activations' dtype."""
    out = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    gate_up, down = wide(weights.gate_up, x.dtype), wide(weights.down, x.dtype)
    for expert in range(gate_up.shape[0]):
        token, place = torch.nonzero(routed.experts == weights.first + expert, as_tuple=True)
        weight = routed.weights[token, place].unsqueeze(-1)
        given = (x[token] * weight).to(x.dtype) if weighs == "input" else x[token]
        gate, up = (given.double() @ gate_up[expert].t()).to(x.dtype).double().chunk(2, -1)
        inner = (functional.silu(gate) * up).to(x.dtype).double()
        found = inner @ down[expert].t()
        out.index_add_(0, token, found if weighs == "input" else found * weight)
    return out


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    found = float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
    return found if found == found else float("inf")


def weights_of(
    kind: str, experts: int, hidden: int, width: int, *, first: int = 0, among: int | None = None
) -> ExpertWeights:
    dtype = FLOAT32 if kind.startswith("float32") else BFLOAT16
    router = drawn(among or experts, hidden, dtype=dtype)
    shapes = (experts, 2 * width, hidden), (experts, hidden, width)
    if "int4" in kind:
        scales = FLOAT32 if kind == "float32, int4 by float32" else BFLOAT16
        return ExpertWeights(router, None, *(packed(*s, scales=scales) for s in shapes), first)
    if "turned" in kind:
        made = (drawn(e, k, n, dtype=dtype).transpose(1, 2) for e, n, k in shapes)
        return ExpertWeights(router, None, *made, first)
    return ExpertWeights(router, None, *(drawn(*s, dtype=dtype) for s in shapes), first)


def choices(tokens: int, routing: Routing, how: str) -> Routed:
    """Different experts for a token; ``skewed``: the same for all, so that others have none."""
    scores = torch.rand(tokens, routing.experts, device="cuda")
    if how == "skewed":
        scores = scores[:1].expand(tokens, -1)
    experts = scores.topk(routing.top_k, -1).indices.contiguous()
    return Routed(experts, torch.rand(tokens, routing.top_k, device="cuda"))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_tokens_choose_as_on_a_cpu(make, name: str, tokens: int) -> None:
    routing, hidden = ROUTINGS[name], 256
    weights = weights_of("float32", 1, hidden, 8, among=routing.experts)
    bias = torch.rand(routing.experts, device="cuda") if routing.has_bias else None
    weights = ExpertWeights(weights.router, bias, weights.gate_up, weights.down)
    x = torch.randn(tokens, hidden, device="cuda")
    got = make(weights, routing).route(x)
    logits = (x.double() @ weights.router.double().t()).float()
    want = route(logits.cpu(), routing, None if bias is None else bias.cpu())
    same = (got.experts.cpu() == want.experts).all(-1)
    # Two scores nearer than the products' rounding may change places.
    assert float(same.double().mean()) >= 1 - 2 / max(tokens, 20), (~same).nonzero()
    torch.testing.assert_close(got.weights.cpu()[same], want.weights[same], rtol=1e-4, atol=1e-6)


def test_equal_scores_go_to_the_first_experts(make) -> None:
    routing = Routing(384, 8, scores="sigmoid")
    weights = weights_of("bfloat16", 1, 64, 8, among=384)
    found = make(weights, routing).route(torch.zeros(5, 64, dtype=BFLOAT16, device="cuda"))
    assert torch.equal(found.experts, torch.arange(8, device="cuda").expand(5, 8))


def test_what_is_no_number_still_chooses_experts_that_are_there(make) -> None:
    weights = weights_of("bfloat16", 1, 64, 8, among=100)
    x = torch.full((3, 64), float("nan"), dtype=BFLOAT16, device="cuda")
    found = make(weights, Routing(100, 6)).route(x).experts
    assert bool(((found >= 0) & (found < 100)).all())
    assert all(len(set(row)) == 6 for row in found.tolist())


@pytest.mark.parametrize("how", ["any", "skewed"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    "kind",
    [
        "bfloat16",
        "bfloat16, turned",
        "int4",
        "float32",
        "float32, turned",
        "float32, int4 by float32",
        "float32, int4 by bfloat16",
    ],
)
def test_sums_of_experts(make, kind: str, tokens: int, how: str) -> None:
    routing = Routing(24, 4)
    weights = weights_of(kind, 24, 384, 96)
    dtype = weights.router.dtype
    x = torch.randn(tokens, 384, device="cuda").to(dtype)
    routed = choices(tokens, routing, how)
    experts = make(weights, routing)
    got = experts.run(x, routed)
    assert off(got, reference(x, weights, routed, "output")) < BOUND[dtype]
    assert torch.equal(got, experts.run(x, routed))
    counted = routed.experts.flatten().bincount(minlength=24)
    assert torch.equal(experts.loads, 2 * counted)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16, turned", "int4", "float32"])
@pytest.mark.parametrize("weighs", ["output", "input"])
def test_some_of_the_experts(make, kind: str, weighs: Any, tokens: int) -> None:
    routing = Routing(16, 2, weighs=weighs)
    weights = weights_of(kind, 5, 256, 64, first=6, among=16)
    x = torch.randn(tokens, 256, device="cuda").to(weights.router.dtype)
    routed = choices(tokens, routing, "any")
    got = make(weights, routing).run(x, routed)
    assert off(got, reference(x, weights, routed, weighs)) < BOUND[x.dtype]


@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16, turned", "int4"])
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "width"),
    [(16, 8, 7168, 256), (6, 2, 7168, 2048), (4, 1, 5120, 4096), (5, 2, 160, 32), (5, 2, 1088, 544)],
)
def test_shapes_of_models(make, kind: str, experts: int, top_k: int, hidden: int, width: int) -> None:
    routing = Routing(experts, top_k)
    weights = weights_of(kind, experts, hidden, width)
    made = make(weights, routing)
    for tokens in (1, 5, 33, 70):
        x = torch.randn(tokens, hidden, device="cuda").to(BFLOAT16)
        routed = choices(tokens, routing, "any")
        assert off(made.run(x, routed), reference(x, weights, routed, "output")) < BOUND[BFLOAT16]


@pytest.mark.parametrize("variant", sum(VARIANTS.values(), ()), ids=lambda v: v.name(gated=False))
def test_every_kernel(make, parts, monkeypatch, variant) -> None:
    routing = Routing(6, 1)
    kind = {"int4": "int4", "bf16": "bfloat16", "turned": "bfloat16, turned"}[variant.kind]
    monkeypatch.setattr("worker.backends.cuda.grouped.choose", lambda *_, **__: variant)
    monkeypatch.setattr("worker.backends.cuda.moe.columns_for", lambda *_: variant.columns)
    for hidden, width in ((4224, 32), (320, 544)):
        weights = weights_of(kind, 6, hidden, width)
        for tokens in (1, 8 * variant.columns, 8 * variant.columns + 1, 150):
            x = torch.randn(tokens, hidden, device="cuda").to(BFLOAT16)
            for how in ("any", "skewed"):
                routed = choices(tokens, routing, how)
                got = make(weights, routing).run(x, routed)
                assert off(got, reference(x, weights, routed, "output")) < BOUND[BFLOAT16]


@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16, turned", "int4", "float32"])
def test_more_tiles_than_are_likely(make, monkeypatch, kind: str) -> None:
    monkeypatch.setattr("worker.backends.cuda.moe.likely_tiles", lambda *_: 2)
    routing = Routing(12, 2)
    weights = weights_of(kind, 12, 256, 64)
    for tokens in (1, 9, 100):
        x = torch.randn(tokens, 256, device="cuda").to(weights.router.dtype)
        routed = choices(tokens, routing, "any")
        got = make(weights, routing).run(x, routed)
        assert off(got, reference(x, weights, routed, "output")) < BOUND[x.dtype]


@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16, turned", "int4"])
def test_a_token_does_not_depend_on_the_others(make, kind: str) -> None:
    routing = Routing(8, 2)
    weights = weights_of(kind, 8, 1024, 256)
    experts = make(weights, routing)
    # As many on average as leaves the tiles' width, and with it the order of sums, the same.
    x = torch.randn(16, 1024, device="cuda").to(BFLOAT16)
    routed = choices(16, routing, "any")
    together = experts.run(x, routed)
    order = torch.randperm(16, device="cuda")
    mixed = Routed(routed.experts[order].contiguous(), routed.weights[order].contiguous())
    assert torch.equal(experts.run(x[order].contiguous(), mixed), together[order])


def test_a_graph_follows_what_tokens_choose(make) -> None:
    routing = Routing(32, 4, normalize=True)
    weights = weights_of("int4", 32, 512, 128)
    experts = make(weights, routing)
    x = torch.randn(9, 512, device="cuda").to(BFLOAT16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        experts.run(x, experts.route(x))
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            found = experts.run(x, experts.route(x))
        for _ in range(3):
            x.copy_(torch.randn(9, 512, device="cuda"))
            graph.replay()
            again = found.clone()
            assert torch.equal(again, experts.run(x, experts.route(x)))
        stream.synchronize()


def test_no_tokens(make) -> None:
    weights = weights_of("bfloat16", 4, 64, 32)
    experts = make(weights, Routing(4, 2))
    x = torch.zeros(0, 64, dtype=BFLOAT16, device="cuda")
    assert experts.run(x, experts.route(x)).shape == (0, 64)


@pytest.mark.parametrize(("choices_", "experts"), [(8, 8), (1, 384), (8192, 384), (1024, 16), (100, 3)])
def test_tiles_are_enough(choices_: int, experts: int) -> None:
    columns = columns_for(choices_, experts)
    for width in (columns, PLAIN_COLUMNS):
        most = most_tiles(choices_, experts, width)
        some = torch.zeros(experts, dtype=torch.int64)
        # As many experts with one slot more than whole tiles as there may be.
        left = choices_
        for expert in range(experts):
            some[expert] = min(left, 1)
            left -= int(some[expert])
        some[0] += left
        assert int((-(-some // (8 * width))).sum()) <= most


@pytest.mark.parametrize(
    ("experts", "top_k", "kind", "width"), [(513, 1, "bfloat16", 8), (32, 17, "bfloat16", 8)]
)
def test_what_kernels_cannot_run_is_refused(make, experts: int, top_k: int, kind: str, width: int) -> None:
    from protocol.errors import UnsupportedModelError

    with pytest.raises(UnsupportedModelError):
        make(weights_of(kind, 1, 64, width, among=experts), Routing(experts, top_k))
    with pytest.raises(UnsupportedModelError):
        make(weights_of("bfloat16", 1, 64, 12), Routing(4, 1))


def test_a_tiny_model_answers_as_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from benchmarks.rank_on_gpu import cuda_instance
    from protocol.topology import Topology
    from tests.golden.harness import Driver, Job, run_ranks_as_threads

    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=90,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.15,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(tmp_path / "tiny")
    expected, found = (
        [Job([(7 * i + j) % 257 for j in range(1 + 9 * i)], 12, start_step=i) for i in range(4)]
        for _ in range(2)
    )
    limits: dict[str, Any] = {"max_rows": 8, "num_blocks": 128, "block_tokens": 16, "context": 128}
    with run_ranks_as_threads(tmp_path / "tiny", Topology(), **limits) as instance:
        Driver(instance).run(expected)
    with cuda_instance(tmp_path / "tiny", dtype="float32", **limits) as on_gpu:
        Driver(on_gpu, chunk=20, depth=2).run(found)  # type: ignore[arg-type]
    assert [job.output_ids for job in found] == [job.output_ids for job in expected]
