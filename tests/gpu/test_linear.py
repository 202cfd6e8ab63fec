"""Products against float64: every kernel of gemv.cu, and what is chosen for a shape."""

import pytest
import torch

from tests.gpu.poison import assert_near, load_kernels, poison_new_tensors
from worker.backends.cuda.linear_table import CUBLAS, GATED, PLAIN, ROW_BUCKETS, Choice, choose

pytestmark = pytest.mark.gpu

SHAPES = ((48, 576), (100, 1000), (1, 8), (1540, 4096), (4096, 64))
"""Outputs and k: less than a tile, odd tails, one piece, many blocks."""


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    kernels = load_kernels(tmp_path_factory.mktemp("kernels"))
    from worker.backends.cuda.linear import Linear

    torch.set_float32_matmul_precision("highest")
    return Linear(kernels)


def factors(rows: int, outputs: int, k: int, dtype: torch.dtype = torch.bfloat16):
    x = torch.randn(rows, k, device="cuda").to(dtype)
    return x, (torch.randn(outputs, k, device="cuda") / k**0.5).to(dtype)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().t()


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.bfloat16().double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def rows_for(tiles: int) -> tuple[int, ...]:
    return {1: (1, 3, 8), 2: (9, 16), 4: (17, 32)}[tiles]


@pytest.mark.parametrize("ahead", [0, 1, 40])
@pytest.mark.parametrize(("tiles", "name"), [(t, name) for t, names in PLAIN.items() for name in names])
def test_every_kernel(linear, monkeypatch, tiles: int, name: str, ahead: int) -> None:
    poison_new_tensors(monkeypatch)
    for outputs, k in SHAPES:
        for rows in rows_for(tiles):
            x, weight = factors(rows, outputs, k)
            for dtype, relative in ((torch.bfloat16, 2.0**-8), (torch.float32, 1e-5)):
                # One row more than the kernel may write.
                out = torch.empty(rows + 1, outputs, dtype=dtype, device="cuda")
                linear.run(Choice(name, ahead), x, weight, out[:rows])
                assert_near(out[:rows], product(x, weight), relative, 2e-4)
                assert bool(out[rows].isnan().all())


@pytest.mark.parametrize(("tiles", "name"), [(t, name) for t, names in GATED.items() for name in names])
def test_every_gated_kernel(linear, monkeypatch, tiles: int, name: str) -> None:
    poison_new_tensors(monkeypatch)
    for outputs, k in SHAPES:
        for rows in rows_for(tiles):
            x, weight = factors(rows, 2 * outputs, k)
            out = torch.empty(rows + 1, outputs, dtype=torch.bfloat16, device="cuda")
            linear.run(Choice(name), x, weight, out[:rows])
            # A product on the edge may round to the neighbour of the reference's.
            assert_near(out[:rows], swiglu(product(x, weight)), 2.0**-5, 2e-3)
            assert bool(out[rows].isnan().all())


@pytest.mark.parametrize(("tiles", "name"), [(t, n) for t in PLAIN for n in PLAIN[t] + GATED[t]])
def test_a_row_does_not_depend_on_the_others(linear, tiles: int, name: str) -> None:
    rows, outputs, k = 8 * tiles, 256, 1024
    x, weight = factors(rows, 2 * outputs, k)
    made = outputs if name.startswith("gated") else 2 * outputs
    together = torch.empty(rows, made, dtype=torch.bfloat16, device="cuda")
    alone = torch.empty_like(together)
    linear.run(Choice(name), x, weight, together)
    for row in range(rows):
        linear.run(Choice(name), x[row : row + 1], weight, alone[row : row + 1])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("outputs", "k"), [(1536, 576), (6144, 4096), (100, 7168), (64, 100), (4096, 14336)]
)
def test_the_chosen_way_at_every_number_of_rows(linear, monkeypatch, outputs: int, k: int) -> None:
    poison_new_tensors(monkeypatch)
    for rows in (*range(1, 34), 300):
        x, weight = factors(rows, outputs, k)
        want = product(x, weight)
        assert_near(linear(x, weight), want, 2.0**-7, 2e-2)
        assert_near(linear(x, weight, torch.float32), want, 1e-5, 2e-4)
        fused = linear.gated(x, weight)
        if fused is not None:
            assert_near(fused, swiglu(want), 2.0**-5, 2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 300, 1025])
def test_a_product_is_added_to_what_is_there(linear, rows: int, dtype: torch.dtype) -> None:
    x, weight = factors(rows, 1000, 576, dtype)
    residual = torch.randn(rows + 1, 1000, device="cuda").to(dtype)
    before = residual.clone()
    linear.add(residual[:rows], x, weight)
    relative, absolute = (2.0**-7, 2e-2) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    assert_near(residual[:rows], before[:rows].double() + product(x, weight), relative, absolute)
    assert torch.equal(residual[rows], before[rows])


@pytest.mark.parametrize("rows", [1, 17, 300])
def test_float32_is_not_tf32(linear, rows: int) -> None:
    x, weight = factors(rows, 300, 1000, torch.float32)
    assert_near(linear(x, weight), product(x, weight), 1e-5, 1e-5)
    assert_near(linear(x, weight, torch.float32), product(x, weight), 1e-5, 1e-5)


def test_a_view_that_kernels_cannot_read_goes_the_other_way(linear) -> None:
    x, weight = factors(4, 64, 128)
    for odd in (x[:, 1:121], x.t()[:4, :4].t()):
        w = weight[:, : odd.shape[1]].contiguous()
        assert_near(linear(odd, w), product(odd, w), 2.0**-7, 1e-2)


def test_every_choice_is_a_kernel_that_holds_its_rows() -> None:
    for gated, table in ((False, PLAIN), (True, GATED)):
        for rows in range(1, 34):
            for outputs in (48, 4096, 6144, 28672, 128256):
                name = choose(rows, outputs, 4096, gated=gated).kernel
                tiles = 1 if rows <= 8 else 2 if rows <= 16 else 4
                assert name == CUBLAS or name in table[tiles], (rows, outputs, name)
    assert ROW_BUCKETS[-1] == 32
