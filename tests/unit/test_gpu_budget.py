"""GPUs in the orchestrator's arithmetic: which there are, what they have left, what ranks may take."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import gpus
from orchestrator.budget import GPU_MARGIN_BYTES, device_kind, rank_budgets
from orchestrator.config import GPU_DEFAULTS, ServeConfig
from protocol.errors import InvalidRequestError, MemoryBudgetError, UnsupportedModelError

GIB = 1 << 30
FREE = (10 * GIB, 20 * GIB)


class FakeNVMLError(Exception):
    """What the driver's library raises."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with two GPUs."""
    nvml = SimpleNamespace(
        NVMLError=FakeNVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(FREE),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(free=FREE[index]),
        nvmlDeviceGetCudaComputeCapability=lambda index: (9, 0),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def budgets(devices: str, ranks: int, memory: int | None = None, **environment: str) -> list[int]:
    return rank_budgets(tuple(devices.split(",")), ranks, memory, environment)


@pytest.mark.usefixtures("driver")
def test_a_gpu_gives_what_it_has_left_but_a_margin() -> None:
    assert budgets("cuda:0", 1) == [FREE[0] - GPU_MARGIN_BYTES]
    assert budgets("cuda:0,cuda:1", 2, 8 * GIB) == [8 * GIB, 8 * GIB]
    halves = budgets("cuda:1", 2)
    assert halves[0] == halves[1] <= FREE[1] // 2 - GPU_MARGIN_BYTES // 2


@pytest.mark.usefixtures("driver")
def test_devices_are_counted_as_the_user_sees_them() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "1"}
    assert gpus.free_bytes("cuda:0", hidden) == FREE[1]
    with pytest.raises(InvalidRequestError, match="cuda:1 was asked, this machine has 1 GPUs"):
        gpus.free_bytes("cuda:1", hidden)
    with pytest.raises(InvalidRequestError, match="unset it"):
        gpus.free_bytes("cuda:0", {"CUDA_VISIBLE_DEVICES": "GPU-8f1e"})
    assert gpus.architectures({}) == [(9, 0)]
    with pytest.raises(UnsupportedModelError, match="no GPU is to be seen"):
        gpus.architectures({"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.usefixtures("driver")
def test_more_than_a_gpu_has_left_is_refused() -> None:
    with pytest.raises(MemoryBudgetError, match=r"11.00 GiB were asked, cuda:0 has 10.00 left") as refused:
        budgets("cuda:0", 1, 11 * GIB)
    assert refused.value.field == "memory"


@pytest.mark.parametrize("devices", ["tpu", "cuda", "cuda:x", "cuda:-1", "cpu,cuda:0", "cuda:0,gpu"])
def test_what_is_no_device_is_refused(devices: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        device_kind(tuple(devices.split(",")))
    assert refused.value.field == "devices"


def test_a_machine_without_a_driver_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UnsupportedModelError, match="the CUDA packages are not installed"):
        budgets("cuda:0", 1)

    def fail() -> None:
        raise FakeNVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=FakeNVMLError, nvmlInit=fail))
    with pytest.raises(UnsupportedModelError, match=r"no NVIDIA driver answers \(Driver Not Loaded\)"):
        budgets("cuda:0", 1)


def test_gpus_have_defaults_of_their_own_and_what_is_asked_stays(tmp_path: Any) -> None:
    def config(**asked: Any) -> ServeConfig:
        return ServeConfig.for_devices(
            name="x", model=tmp_path, runtime_root=tmp_path, environment={}, **asked
        )

    assert (config().dtype, config().block_tokens, config().max_rows) == ("float32", 16, 64)
    on_gpu = config(devices=("cuda:0",), max_rows=7)
    assert (on_gpu.dtype, on_gpu.block_tokens, on_gpu.max_rows) == ("bfloat16", 64, 7)
    assert on_gpu.step_tokens == GPU_DEFAULTS["step_tokens"]
