"""What must hold before torch is there, and what a worker refuses to boot."""

import subprocess
import sys

import msgspec
import pytest

from models.registry import _ARCHITECTURES
from models.spec import ModelSpec
from protocol.control import Boot
from protocol.errors import UnsupportedModelError
from protocol.topology import Topology
from worker.boot import boot_rank
from worker.layers.parts import Parts
from worker.models.base import build


def test_a_worker_starts_without_torch() -> None:
    code = "import sys, worker.__main__; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_a_device_without_a_backend_is_refused_before_anything_is_read() -> None:
    boot = Boot(
        1,
        "x",
        0,
        Topology(),
        [[0, 1]],
        "/nowhere",
        "float32",
        "tpu:0",
        [],
        0,
        1,
        1,
        1,
        1,
        "",
        1,
        1,
        1,
        1,
        1,
        "",
        1.0,
    )
    with pytest.raises(UnsupportedModelError, match="device 'tpu:0' has no backend here"):
        boot_rank(boot, lambda message: None)


@pytest.mark.parametrize("wrong", ["architecture", "window"])
def test_what_has_no_forward_pass_is_refused(wrong: str, parts: Parts) -> None:
    raw = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 31,
    }
    spec: ModelSpec = _ARCHITECTURES["LlamaForCausalLM"](raw, "float32")
    if wrong == "architecture":
        spec, message = msgspec.structs.replace(spec, architecture="gpt9"), "'gpt9' has no forward pass"
    else:
        (group,) = spec.kv_groups
        sliding = msgspec.structs.replace(group, kind="sliding", window=8)
        spec, message = msgspec.structs.replace(spec, kv_groups=(sliding,)), "is sliding: full, chunked"
    with pytest.raises(UnsupportedModelError, match=message):
        build(parts, spec, range(1), 8, is_first=True, is_last=True)


@pytest.fixture
def parts() -> Parts:
    """Nothing of it is touched before a refusal."""
    return object.__new__(Parts)
