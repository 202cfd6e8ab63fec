"""GPUs as figures, and how they are asked for."""

import pytest

from models.machines import GPUS, MOST_GPUS, gpu_of_driver, parse_gpus
from protocol.errors import InvalidRequestError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "machines", "each", "gpu", "network"),
    [
        ("H200", 1, 1, "H200-141GB", "InfiniBand"),
        ("8xH100-80GB", 1, 8, "H100-80GB", "InfiniBand"),
        ("2xh200", 1, 2, "H200-141GB", "InfiniBand"),
        ("2x8xH100-80GB", 2, 8, "H100-80GB", "InfiniBand"),
        ("2x8xh100@roce", 2, 8, "H100-80GB", "RoCE"),
        ("4xA100-40gb", 1, 4, "A100-40GB", "InfiniBand"),
        (" 1xB200 ", 1, 1, "B200-180GB", "InfiniBand"),
    ],
)
def test_gpus_are_read_from_text(text: str, machines: int, each: int, gpu: str, network: str) -> None:
    found = parse_gpus(text)
    assert (found.machines, found.gpus_each, found.gpu.name) == (machines, each, gpu)
    assert found.network.name == network
    assert found.num_gpus == machines * each


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "of the form"),
        ("8", "of the form"),
        ("x", "names a GPU"),
        ("8xx", "names a GPU"),
        ("8 x H100", "of the form"),
        ("8xH100-80GB,1xH200", "of the form"),
        ("-8xH100", "of the form"),
        ("٨xH100", "of the form"),
        ("2x2x2xH100", "of the form"),
        ("0xH100", "at least 1"),
        ("2x0xH100", "at least 1"),
        ("999xH100", f"at most {MOST_GPUS}"),
        ("99x99xH100", f"at most {MOST_GPUS}"),
        ("8xV100", "H100-80GB, H200-141GB"),
        ("8xH100-94GB", "names a GPU"),
        ("2x8xH100@carrier", "InfiniBand, RoCE are known"),
        ("8xH100@roce", "needs no network"),
        ("8xH100@", "of the form"),
        ("9" * 5000 + "xH100", "of the form"),
    ],
)
def test_what_names_no_gpus_is_refused(text: str, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told) as refused:
        parse_gpus(text)
    assert refused.value.field == "gpus"
    assert len(refused.value.message) < 400


def test_figures_are_those_measured_on_the_h200() -> None:
    h200 = GPUS["H200-141GB"]
    assert h200.usable_bytes == int(139.8 * GIB)
    assert h200.read_bytes_s == pytest.approx(4.66e12)
    assert h200.matmul_flops == pytest.approx(785e12)
    assert h200.nvlink.bytes_s == pytest.approx(396e9)
    assert h200.host_bytes_s == pytest.approx(55.5e9)


def test_ranks_of_two_machines_talk_over_the_network() -> None:
    machines = parse_gpus("2x4xH100")
    assert machines.link(range(4)).name == "NVLink"
    assert machines.link(range(4, 8)).name == "NVLink"
    assert machines.link(range(3, 5)).name == "InfiniBand"
    assert machines.link(range(8)).name == "InfiniBand"


@pytest.mark.parametrize(
    ("name", "total", "known"),
    [
        ("NVIDIA H200", 139.8, "H200-141GB"),
        ("NVIDIA H100 80GB HBM3", 79.6, "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80GB"),
        ("NVIDIA B200", 179.1, "B200-180GB"),
        ("NVIDIA GeForce RTX 4090", 24.0, None),
    ],
)
def test_the_drivers_names(name: str, total: float, known: str | None) -> None:
    found = gpu_of_driver(name, int(total * GIB))
    assert (found and found.name) == known
