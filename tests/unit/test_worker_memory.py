"""Measured memory, KV memory and the parent's watch."""

import mmap
import os
import signal
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from kv.tensors import HostRegion, KVLayout, KVTensors
from models.registry import _ARCHITECTURES
from models.spec import ModelSpec
from protocol.errors import MemoryBudgetError
from protocol.topology import Topology
from worker.memory import MemoryMeter

MIB = 1 << 20


def tiny_spec(groups: int = 1) -> ModelSpec:
    raw = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 31,
    }
    spec = _ARCHITECTURES["LlamaForCausalLM"](raw, "float32")
    (whole,) = spec.kv_groups
    parts = tuple(msgspec.structs.replace(whole, layers=whole.layers[g::groups]) for g in range(groups))
    return msgspec.structs.replace(spec, kv_groups=parts)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("granule", [1, 4096])
def test_every_layer_has_lines_of_its_own_in_the_blocks_of_its_group(
    groups: int, tp: int, granule: int
) -> None:
    spec, layers = tiny_spec(groups), range(1, 4)
    places = 3 if groups == 1 else 2
    per_block = 3 * places * spec.kv_groups[0].bytes_per_token(Topology(tp), range(1))
    layout = KVLayout.of(spec, layers, Topology(tp), 7, 3, 7 * per_block, granule)
    assert layout.used_bytes == 7 * per_block
    assert layout.used_bytes <= layout.size_bytes < layout.used_bytes + places * granule
    assert len(layout.places) == places
    assert all(offset % granule == 0 for offset in layout.offsets.values())
    cache = KVTensors(spec, Topology(tp), layout, HostRegion.anonymous("test-kv", layout.size_bytes))
    for layer in layers:
        assert cache[layer].group == layer % groups
        assert cache[layer].lines.shape == (21, spec.kv_groups[0].local_heads(Topology(tp)) * 8)
        # A block belongs to one group: here every second one.
        cache[layer].lines.view(7, 3, -1)[layer % groups :: groups] = layer
    for layer in layers:
        keys, values = cache[layer].keys_values(cache[layer].lines)
        assert keys.shape == values.shape == (spec.kv_groups[0].local_heads(Topology(tp)), 21, 4)
        assert (cache[layer].lines.view(7, 3, -1)[layer % groups :: groups] == layer).all()
    with pytest.raises(KeyError):
        cache[0]


def test_kv_beyond_its_grant_is_refused() -> None:
    spec = tiny_spec()
    needed = 4 * 3 * sum(g.bytes_per_token(Topology(), range(5)) for g in spec.kv_groups)
    with pytest.raises(MemoryBudgetError, match=f"take {needed} bytes .* the plan grants {needed - 1}"):
        KVLayout.of(spec, range(5), Topology(1), 4, 3, needed - 1)


def test_a_peak_is_measured_after_it_is_gone_and_growth_while_it_stays() -> None:
    meter = MemoryMeter()
    meter.peak("peak", lambda: np.ones(40 * MIB, np.uint8).sum())

    def work() -> mmap.mmap:
        # Mapped afresh: memory of the allocator may be there already.
        mapped = mmap.mmap(-1, 24 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(mapped, np.uint8)[:] = 1
        return mapped

    kept = meter.growth("growth", work)
    found = {line.name: line.measured_bytes for line in meter.lines()}
    assert len(kept) == 24 * MIB
    assert 23 * MIB < found["growth"] < 32 * MIB
    assert 39 * MIB < found["peak"] < 60 * MIB


def test_a_peak_grows_by_the_unit_and_shared_pages_are_not_in_it() -> None:
    meter = MemoryMeter()
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 64 * MIB)
    with open(fd, "r+b") as file:
        shared = np.memmap(file, np.uint8, "r+")

        def work(units: int) -> int:
            shared[:] = 1
            # Mapped afresh: memory of the allocator may be there already.
            with mmap.mmap(-1, (32 + 8 * units) * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own:
                for page in range(0, len(own), mmap.PAGESIZE):
                    own[page] = 1
            return units

        assert meter.peak_at("peak", 10, work, 3) == (1, 3)
    (line,) = meter.lines()
    # 112 MiB; scaled as a whole it would be 187.
    assert 105 * MIB < line.measured_bytes < 125 * MIB


CHILD = """
import os, time
from worker.parent import Parent
parent = Parent(os.getppid())
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"


def test_the_kernel_ends_a_child_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    try:
        parent.send_signal(signal.SIGKILL)
        # The child held the pipe's other end: it closes when the child is gone.
        assert parent.stdout.read() == ""
    finally:
        parent.wait(10)
        parent.stdout.close()
        os.close(child)
