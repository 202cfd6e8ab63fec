"""What becomes of a plan once the ranks say what room they found."""

from pathlib import Path

import msgspec
import pytest

from orchestrator.config import ServeConfig
from orchestrator.instance import Blueprint, check_devices
from protocol.control import Ready
from protocol.errors import MemoryBudgetError, UnsupportedModelError
from tests.tiny_llama import write_tiny_llama

CONTEXT, BLOCK_TOKENS = 512, 16


def planned(path: Path, context: int | None) -> Blueprint:
    model = write_tiny_llama(path / "model", context=CONTEXT)
    asked = ServeConfig(
        name="m",
        model=model,
        runtime_root=path,
        environment={},
        tp=2,
        context=context,
        block_tokens=BLOCK_TOKENS,
        memory_bytes=1 << 30,
    )
    return Blueprint.of(asked)


def ready(*num_blocks: int) -> list[Ready]:
    return [Ready(1, rank, [], [], 1e-6, 1e-3, blocks) for rank, blocks in enumerate(num_blocks)]


def test_the_rank_with_the_least_room_decides(tmp_path: Path) -> None:
    blueprint = planned(tmp_path, None).settled(ready(1000, 900))
    assert blueprint.plan.num_blocks == 900
    assert blueprint.plan.kv_tokens == 900 * BLOCK_TOKENS
    assert blueprint.plan.context == CONTEXT
    assert blueprint.plan.note is None


def test_a_context_is_no_longer_than_the_room_there_is(tmp_path: Path) -> None:
    plan = planned(tmp_path, None).settled(ready(40, 20)).plan
    assert (plan.context, plan.kv_tokens) == (320, 320)
    assert plan.note is not None
    assert "320 tokens" in plan.note


@pytest.mark.parametrize(("context", "blocks"), [(400, 20), (None, 0)])
def test_a_context_that_was_asked_for_is_not_shortened(
    tmp_path: Path, context: int | None, blocks: int
) -> None:
    with pytest.raises(MemoryBudgetError, match=rf"room for {blocks * BLOCK_TOKENS} tokens"):
        planned(tmp_path, context).settled(ready(blocks, 1000))


def test_what_gpus_do_not_do_is_refused_before_anything_starts(tmp_path: Path) -> None:
    blueprint = planned(tmp_path, None)
    model, config = blueprint.model, blueprint.config
    (whole,) = model.kv_groups
    chunked = msgspec.structs.replace(whole, kind="chunked", window=64)
    local = msgspec.structs.replace(model, kv_groups=(chunked,))
    on_gpus = msgspec.structs.replace(config, devices=("cuda:0", "cuda:1"))
    divided = msgspec.structs.replace(on_gpus, tp=4, dcp=2)
    check_devices(model, on_gpus)
    check_devices(local, config)
    for asked, given, field in ((model, divided, "dcp"), (local, on_gpus, "devices")):
        with pytest.raises(UnsupportedModelError, match="served on CPUs") as refusal:
            check_devices(asked, given)
        assert refusal.value.field == field
