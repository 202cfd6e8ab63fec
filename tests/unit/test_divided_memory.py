"""KV kept by position takes the memory of one copy: in the plan's figures, and in the buffers."""

from pathlib import Path

import msgspec
import pytest

from kv.tensors import HostRegion, KVLayout, KVTensors
from models.layout import check_degrees
from models.memory import CPU_OVERHEADS, DIVIDED_BYTES, StepLimits, divide_memory
from protocol.errors import LayoutError
from protocol.topology import Topology
from tests.unit.test_deepseek import kimi
from tests.unit.test_models_qwen3 import QWEN3_30B_A3B, spec_of

LIMITS = StepLimits(max_rows=16, step_tokens=128, logit_rows=4, block_tokens=16)
GIB = 1 << 30


@pytest.mark.parametrize(("name", "tp", "dcp"), [("kimi", 8, 2), ("kimi", 8, 8), ("qwen3", 8, 2)])
def test_a_budget_holds_as_many_times_the_tokens_as_ranks_divide_them(
    tmp_path: Path, name: str, tp: int, dcp: int
) -> None:
    model = kimi(tmp_path) if name == "kimi" else spec_of(tmp_path, QWEN3_30B_A3B)
    budgets = [300 * GIB] * tp
    whole, divided = (
        divide_memory(model, Topology(tp, dcp=degree), budgets, LIMITS, CPU_OVERHEADS)[0]
        for degree in (1, dcp)
    )
    assert divided.block_bytes * dcp == whole.block_bytes
    # All that differs is what pieces of other ranks' context take.
    assert abs(whole.kv_bytes - divided.kv_bytes - DIVIDED_BYTES) < whole.block_bytes
    gain = (divided.kv_bytes // divided.block_bytes) / (whole.kv_bytes // whole.block_bytes)
    assert gain == pytest.approx(dcp, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_an_instance_has_each_position_of_a_head_once(tmp_path: Path, dtype: str) -> None:
    model = spec_of(tmp_path, QWEN3_30B_A3B, num_hidden_layers=2)
    (group,) = model.kv_groups
    model = msgspec.structs.replace(model, kv_groups=(msgspec.structs.replace(group, dtype=dtype),))
    num_blocks, block_tokens = 10, 16
    held = {}
    for topology in (Topology(4), Topology(8), Topology(8, dcp=2)):
        layout = KVLayout.of(model, range(2), topology, num_blocks, block_tokens, GIB)
        region = HostRegion.anonymous("tandem-kv-test", layout.size_bytes)
        cache = KVTensors(model, topology, layout, region)[1]
        held[topology] = topology.tp * cache.lines.nbytes
        assert layout.used_bytes == 2 * cache.lines.nbytes
        if dtype == "float8":
            assert cache.page_tokens == topology.page_tokens(block_tokens)
        else:
            assert cache.lines.shape[0] == num_blocks * topology.page_tokens(block_tokens)
    # 4 KV heads: 8 ranks keep two copies, unless they divide the positions.
    assert held[Topology(8, dcp=2)] == held[Topology(4)] == held[Topology(8)] // 2


def test_a_block_is_made_of_equal_pages() -> None:
    assert [Topology(tp=dcp, dcp=dcp).whole_block(16) for dcp in (1, 2, 3, 8, 16, 32)] == [
        16,
        16,
        18,
        16,
        16,
        32,
    ]


def test_degrees_that_cannot_be_say_which_can(tmp_path: Path) -> None:
    model = spec_of(tmp_path, QWEN3_30B_A3B)
    for tp, dcp in ((8, 2), (16, 4), (32, 8)):
        check_degrees(model, Topology(tp, dcp=dcp))
    with pytest.raises(
        LayoutError, match="each of the 4 KV heads of 'full' is on 4 ranks; degrees that do: 1, 2, 4"
    ) as caught:
        check_degrees(model, Topology(16, dcp=8))
    assert caught.value.field == "dcp"
    local = msgspec.structs.replace(model.kv_groups[0], kind="chunked", window=8192)
    with pytest.raises(LayoutError, match=r"keeps 8192 tokens of a request: .* give dcp 1"):
        check_degrees(msgspec.structs.replace(model, kv_groups=(local,)), Topology(8, dcp=2))
