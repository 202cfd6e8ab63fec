"""Elementwise kernels against float64 references, and captured chains against eager ones."""

import pytest
import torch

from kv.tensors import LayerCache
from tests.gpu.poison import assert_near, load_kernels, poison_new_tensors

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float32)
RELATIVE = {torch.bfloat16: 2.0**-8, torch.float32: 1e-5}
EPS = 1e-5


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return load_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def elementwise(kernels, monkeypatch):
    from worker.backends.cuda.elementwise import Elementwise

    poison_new_tensors(monkeypatch)
    return Elementwise(kernels)


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def norm_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


SHAPES = [(rows, width) for width in (576, 4096, 7168, 100, 13) for rows in (1, 2, 33, 300)] + [
    (8192, 4096),
    (8192, 576),
    (1, 16384),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_norms(elementwise, rows: int, width: int, dtype: torch.dtype) -> None:
    residual, update = randn(rows, width, dtype=dtype), 3 * randn(rows, width, dtype=dtype)
    weight = randn(width, dtype=dtype)
    alone = elementwise.rms_norm(residual, weight, EPS)
    assert_near(alone, norm_of(residual, weight), RELATIVE[dtype], 1e-6)
    summed = (residual.float() + update.float()).to(dtype)
    after = elementwise.add_norm(residual, update, weight, EPS)
    assert torch.equal(residual, summed)
    assert_near(after, norm_of(summed, weight), RELATIVE[dtype], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 13), (33, 100), (1, 4096), (8192, 4096)])
def test_add(elementwise, rows: int, width: int, dtype: torch.dtype) -> None:
    residual, update = randn(rows, width, dtype=dtype), randn(rows, width, dtype=dtype)
    summed = (residual.float() + update.float()).to(dtype)
    elementwise.add(residual, update)
    assert torch.equal(residual, summed)


def test_odd_addresses(elementwise) -> None:
    for dtype in DTYPES:
        whole = randn(5 * 64 + 1, dtype=dtype)
        x = whole[1:].view(5, 64)
        weight = randn(64, dtype=dtype)
        assert_near(elementwise.rms_norm(x, weight, EPS), norm_of(x, weight), RELATIVE[dtype], 1e-6)
        kept, update = whole[0].clone(), randn(5, 64, dtype=dtype)
        summed = (x.float() + update.float()).to(dtype)
        elementwise.add(x, update)
        assert torch.equal(x, summed)
        assert whole[0] == kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 14336), (33, 1536), (7, 100), (5, 13), (8192, 1792), (0, 64)]
)
def test_swiglu(elementwise, rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = randn(rows, 2 * width, dtype=dtype)
    if rows:
        gate_up[0, 0], gate_up[-1, 1] = -100, 100
    gate, up = gate_up.double().chunk(2, dim=-1)
    want = gate / (1 + (-gate).exp()) * up
    assert_near(elementwise.swiglu(gate_up), want, RELATIVE[dtype], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (33, 576), (7, 13), (8192, 100)])
def test_embed(elementwise, rows: int, width: int, dtype: torch.dtype) -> None:
    first, count = 50, 200
    weight = randn(count, width, dtype=dtype)
    ids = torch.randint(0, 300, (rows,), device="cuda")
    ids[0] = first + count  # the first of the next rank
    inside = (ids >= first) & (ids < first + count)
    want = torch.where(inside[:, None], weight[(ids - first).clamp(0, count - 1)], 0)
    assert torch.equal(elementwise.embed(ids, weight, first, count), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"),
    [(32, 8, 128, 128), (9, 3, 64, 64), (9, 3, 24, 24), (3, 1, 6, 10), (4, 2, 64, 40)],
)
@pytest.mark.parametrize("tokens", [1, 5, 200, 8192])
def test_rope_and_store(elementwise, tokens, heads, kv_heads, key_dim, value_dim, dtype) -> None:
    kept = (heads + kv_heads) * key_dim
    qkv = randn(tokens, kept + kv_heads * value_dim, dtype=dtype)
    angles = torch.rand(tokens, key_dim // 2, device="cuda") * 6.28
    rotation = torch.stack((angles.cos(), -angles.sin(), angles.sin()), dim=1).to(dtype)
    num_lines = tokens + 50
    stored = torch.full((num_lines, kv_heads * (key_dim + value_dim)), 7.0, device="cuda", dtype=dtype)
    lines = torch.randperm(num_lines, device="cuda")[:tokens]
    lines[tokens // 3 :: 5] = -1
    before = qkv.clone()
    queries = elementwise.rope_and_store(
        qkv, rotation, LayerCache(0, stored, kv_heads, key_dim, value_dim), lines
    )
    assert torch.equal(qkv, before)
    turned = qkv[:, :kept].double().view(tokens, heads + kv_heads, 2, key_dim // 2)
    low, high = turned[:, :, 0], turned[:, :, 1]
    cos, sin = rotation[:, None, 0].double(), rotation[:, None, 2].double()
    want = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    assert_near(queries, want[:, :heads].reshape(tokens, -1), RELATIVE[dtype], 1e-5)
    wanted = torch.full(stored.shape, 7.0, device="cuda", dtype=torch.float64)
    written = lines >= 0
    keys_values = torch.cat((want[:, heads:].reshape(tokens, -1), qkv[:, kept:].double()), dim=-1)
    wanted[lines[written]] = keys_values[written]
    assert_near(stored, wanted, RELATIVE[dtype], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"), [(32, 8, 128, 128), (5, 1, 80, 256)]
)
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_rope_and_store_in_float8(elementwise, tokens, heads, kv_heads, key_dim, value_dim, dtype) -> None:
    block = 16
    kept, width = (heads + kv_heads) * key_dim, kv_heads * (key_dim + value_dim)
    qkv = randn(tokens, heads * key_dim + width, dtype=dtype)
    # Tokens of all sizes, and one that is nothing.
    qkv *= torch.logspace(-6, 6, tokens, device="cuda", dtype=dtype)[:, None]
    qkv[tokens // 2] = 0
    angles = torch.rand(tokens, key_dim // 2, device="cuda") * 6.28
    rotation = torch.stack((angles.cos(), -angles.sin(), angles.sin()), dim=1).to(dtype)
    blocks = tokens // block + 3
    pages = torch.full((blocks, block * (width + 2 * kv_heads)), 7, device="cuda", dtype=torch.uint8)
    cache = LayerCache(0, pages, kv_heads, key_dim, value_dim)
    lines = torch.randperm(blocks * block, device="cuda")[:tokens]
    lines[tokens // 3 :: 5] = -1
    queries = elementwise.rope_and_store(qkv, rotation, cache, lines)
    turned = qkv[:, :kept].double().view(tokens, heads + kv_heads, 2, key_dim // 2)
    low, high = turned[:, :, 0], turned[:, :, 1]
    cos, sin = rotation[:, None, 0].double(), rotation[:, None, 2].double()
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    # Where the two products cancel, their own size says how near is near.
    sizes = qkv.double().abs().amax(1, keepdim=True).clamp(min=1e-12)
    wanted_queries = rotated[:, :heads].reshape(tokens, -1) / sizes
    assert_near(queries.double() / sizes, wanted_queries, RELATIVE[dtype], RELATIVE[dtype])
    written = lines >= 0
    block_of, inside = lines[written] // block, lines[written] % block
    codes, scales = cache.codes(pages), cache.scales(pages)
    wanted = (rotated[:, heads:], qkv[:, kept:].double().view(tokens, kv_heads, value_dim))
    columns = (slice(0, kv_heads * key_dim), slice(kv_heads * key_dim, width))
    for part in range(2):
        want = wanted[part][written]
        found = codes.view(torch.uint8)[block_of, inside, columns[part]].view(torch.float8_e4m3fn).double()
        factors = torch.exp2(scales[block_of, :, part, inside].double() - 127).unsqueeze(-1)
        largest = want.abs().amax(-1, keepdim=True)
        assert bool((largest <= 448.01 * factors).all())
        assert bool(((largest >= 223.99 * factors) | (factors == 2.0**-126)).all())
        # Half of the distance of two codes: 1/16 of the number, or what it is beside nothing.
        error = (found.view_as(want) * factors - want).abs()
        assert bool((error <= torch.maximum(want.abs() / 16, factors / 1024) * 1.01).all())
    untouched = torch.ones(blocks, block, device="cuda", dtype=torch.bool)
    untouched[block_of, inside] = False
    assert bool((codes.view(torch.uint8)[untouched] == 7).all())
    assert bool((scales.permute(0, 3, 1, 2)[untouched] == 7).all())


class Chain:
    """A small model's decode step without attention: its queries go straight to the next product."""

    def __init__(self, backend, layers: int = 4, hidden: int = 1024, inner: int = 2816) -> None:
        from worker.backends.cuda.backend import CudaStepPlan

        self.backend, self.rows = backend, 4
        heads, kv_heads, dim, dtype = 16, 4, 64, torch.bfloat16

        def weight(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).to(dtype)

        self.layers = [
            (
                weight(hidden),
                weight((heads + 2 * kv_heads) * dim, hidden),
                weight(hidden, heads * dim),
                weight(2 * inner, hidden),
                weight(hidden, inner),
                LayerCache(
                    0, torch.zeros(64, kv_heads * 2 * dim, device="cuda", dtype=dtype), kv_heads, dim, dim
                ),
            )
            for _ in range(layers)
        ]
        self.norm = torch.ones(hidden, device="cuda", dtype=dtype)
        self.head = weight(1000, hidden)
        self.x = torch.zeros(self.rows, hidden, device="cuda", dtype=dtype)
        angles = torch.rand(self.rows, dim // 2, device="cuda")
        self.rotation = torch.stack((angles.cos(), -angles.sin(), angles.sin()), dim=1).to(dtype)
        self.lines = torch.tensor([5, -1, 9, 0], device="cuda")
        self.plan = CudaStepPlan(self.lines, None)

    def __call__(self) -> torch.Tensor:
        backend, comm = self.backend, SoloComm()
        residual, update = self.x * 1, self.x * 0
        for _, qkv, o, gate_up, down, cache in self.layers:
            x = backend.reduce_add_norm(residual, update, self.norm, EPS, comm)
            queries = backend.rope_and_store(backend.linear(x, qkv), self.rotation, cache, self.plan)
            update = backend.linear(queries, o)
            x = backend.reduce_add_norm(residual, update, self.norm, EPS, comm)
            update = backend.linear(backend.swiglu_linear(x, gate_up), down)
        x = backend.reduce_add_norm(residual, update, self.norm, EPS, comm)
        return backend.logits(x, self.head)

    def caches(self) -> torch.Tensor:
        return torch.stack([layer[-1].lines for layer in self.layers])


def test_copies_and_fills_before_and_after_a_kernel_in_a_graph(kernels) -> None:
    from worker.backends.cuda.elementwise import Elementwise

    elementwise = Elementwise(kernels)
    x, update = torch.zeros(3, 4096, device="cuda"), torch.ones(3, 4096, device="cuda")

    def run() -> torch.Tensor:
        residual = x.clone()
        elementwise.add(residual, update)
        elementwise.add(residual, update)
        made = residual.clone()
        residual.zero_()
        elementwise.add(residual, update)
        return made + residual

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            made = run()
        for value in range(5):
            x.fill_(value)
            graph.replay()
            assert bool((made == value + 3).all())


class SoloComm:
    """No peers."""

    class topology:  # noqa: N801
        tp = 1


def test_a_captured_chain_gives_the_bits_of_eager_and_of_one_kernel_at_a_time(kernels, monkeypatch) -> None:
    from worker.backends.cuda.backend import CudaBackend
    from worker.backends.cuda.launch import Kernel

    chain = Chain(CudaBackend(torch.device("cuda"), kernels, None))
    launch = Kernel.__call__

    def launch_alone(self, *arguments) -> None:
        torch.cuda.synchronize()
        launch(self, *arguments)
        torch.cuda.synchronize()

    inputs = [torch.randn_like(chain.x) for _ in range(40)]
    wanted = []
    with monkeypatch.context() as patched:
        patched.setattr(Kernel, "__call__", launch_alone)
        for x in inputs:
            chain.x.copy_(x)
            wanted.append((chain().clone(), chain.caches()))
    eager = []
    for x in inputs:
        chain.x.copy_(x)
        eager.append((chain(), chain.caches()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        chain()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            logits = chain()
        replayed = []
        for x in inputs:
            chain.x.copy_(x)
            graph.replay()
            replayed.append((logits.clone(), chain.caches()))
    torch.cuda.synchronize()
    assert not torch.equal(wanted[0][0], wanted[1][0])
    for want, *others in zip(wanted, eager, replayed, strict=True):
        assert bool(want[0].isfinite().all())
        for other in others:
            assert torch.equal(want[0], other[0])
            assert torch.equal(want[1], other[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 4, 128), (3, 1, 12)])
def test_norm_heads_leaves_other_columns(
    kernels, monkeypatch, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    from worker.backends.cuda.backend import CudaBackend

    poison_new_tensors(monkeypatch)
    backend = CudaBackend(torch.device("cuda"), kernels, None)
    qkv, weight = randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype), randn(dim, dtype=dtype)
    before, columns = qkv.clone(), slice(heads * dim, (heads + kv_heads) * dim)
    backend.norm_heads(qkv[:, columns], weight, EPS)
    expected = norm_of(before[:, columns].reshape(-1, dim), weight)
    assert_near(qkv[:, columns].reshape(-1, dim), expected, RELATIVE[dtype], 1e-6)
    assert torch.equal(qkv[:, : columns.start], before[:, : columns.start])
    assert torch.equal(qkv[:, columns.stop :], before[:, columns.stop :])
