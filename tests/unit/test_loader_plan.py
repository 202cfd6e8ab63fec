"""The plan and the reader against their naive twin: slices taken with ``safe_open``, a tensor at a time."""

import json
import math
import mmap
import os
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from loader import plan as plan_module
from loader import reader
from loader.index import INDEX_NAME, check_against, read_index
from loader.plan import LoadPlan, plan_load
from loader.reader import arenas_written, load
from models import qwen3_moe
from models.layout import arena
from models.llama import spec
from models.parameter import Cut, ParameterSpec, Segment
from models.spec import ModelSpec
from protocol.errors import ModelFormatError, StorageError
from protocol.topology import Topology

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_config(
    heads: int, kv_heads: int, dim: int, ffn: int, layers: int, vocab: int, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": heads * dim,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


def write_checkpoint(
    directory: Path, model: ModelSpec, dtypes: list[str], shard_count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {s.source: s.shape for p in model.parameters for s in p.segments}
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shard_count)]
    weight_map = {}
    for i, (name, shape) in enumerate(shapes.items()):
        values = torch.randn(shape, generator=generator).to(TORCH[dtypes[i % len(dtypes)]])
        where = (i * 7 + i // 3) % shard_count
        files[where][name] = values
        weight_map[name] = f"model-{where}.safetensors"
    if shard_count == 1:
        save_file(files[0], directory / "model.safetensors")
        return
    for i, held in enumerate(files):
        if held:
            save_file(held, directory / f"model-{i}.safetensors")
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def misalign(file: Path, spaces: int) -> None:
    """Lengthen a header, so that elements stand at addresses that are no multiple of their size."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes(
        (length + spaces).to_bytes(8, "little")
        + content[8 : 8 + length]
        + b" " * spaces
        + content[8 + length :]
    )


def naive(
    directory: Path, model: ModelSpec, topology: Topology, stages: tuple[range, ...], rank: int
) -> bytes:
    held = arena(model, topology, stages, rank)
    result = torch.zeros(held.size, dtype=torch.uint8)
    tensors = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for placed in held.placed:
        if placed.is_alias:
            continue
        flat_shape = placed.spec.flat_shape(topology)
        assert math.prod(flat_shape) == math.prod(placed.spec.local_shape(topology))
        local = torch.zeros(flat_shape, dtype=TORCH[placed.spec.dtype])
        for piece in placed.spec.pieces(topology, topology.tp_rank(rank)):
            extent = piece.end - piece.start
            part = tensors[piece.source].narrow(piece.dim, piece.start, extent)
            rows = local if piece.dim == 0 else local.narrow(0, piece.row, piece.source_shape[0])
            rows.narrow(piece.dim, piece.destination, extent).copy_(part.to(TORCH[placed.spec.dtype]))
        flat = local.reshape(-1).view(torch.uint8)
        result[placed.offset : placed.offset + len(flat)] = flat
    return result.numpy().tobytes()


def even_stages(layers: int, pp: int) -> tuple[range, ...]:
    edges = [layers * i // pp for i in range(pp + 1)]
    return tuple(range(a, b) for a, b in pairwise(edges))


def check_reads(plan: LoadPlan, model: ModelSpec, directory: Path) -> None:
    """Every byte that a tensor of the model has is read exactly once, and nothing else."""
    checkpoint = read_index(directory)
    spans = sorted((r.file, r.offset, r.offset + r.length) for mine in plan.reads for r in mine)
    for (file, _, end), (next_file, start, _) in pairwise(spans):
        assert file != next_file or end <= start
    wanted = {s.source for p in model.parameters for s in p.segments}
    covered: Counter[int] = Counter()
    for file, start, end in spans:
        covered[file] += end - start
    needed: Counter[int] = Counter()
    for name in wanted:
        needed[checkpoint.tensors[name].file] += checkpoint.tensors[name].length
    assert covered == needed
    for rank, mine in enumerate(plan.reads):
        assert [(r.file, r.offset) for r in mine] == sorted((r.file, r.offset) for r in mine)
        assert all(r.rank == rank for r in mine)


def run_all(plan: LoadPlan, threads: int = 2) -> list[mmap.mmap]:
    arenas = [mmap.mmap(-1, max(size, 1)) for size in plan.arena_bytes]
    views = {rank: memoryview(held) for rank, held in enumerate(arenas)}
    done = []
    for rank in range(len(arenas)):
        seen: list[int] = []
        report = load(plan, rank, {r: views[r] for r in arenas_written(plan, rank)}, threads, seen.append)
        assert report.bytes == plan.bytes_read(rank) == (seen[-1] if seen else 0)
        assert seen == sorted(seen)
        done.append(report.bytes)
    assert sum(done) == plan.total_bytes
    return arenas


layouts = st.fixed_dictionaries(
    {
        "kv_heads": st.sampled_from([1, 2, 4, 8]),
        "groups": st.sampled_from([1, 2, 3]),
        "dim": st.sampled_from([2, 6]),
        "ffn": st.integers(1, 40),
        "layers": st.integers(1, 5),
        "vocab": st.integers(1, 50),
        "tied": st.booleans(),
        "experts": st.sampled_from([0, 0, 1, 3, 8]),
        "is_placed": st.booleans(),
        "tp": st.sampled_from([1, 2, 3, 4, 8]),
        "pp": st.integers(1, 4),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "on_disk": st.lists(st.sampled_from(list(TORCH)), min_size=1, max_size=3),
        "shards": st.integers(1, 4),
        "block": st.sampled_from([64, 512, 4096, plan_module.BLOCK_BYTES]),
        "share": st.sampled_from([16, 256, plan_module.SHARE_BYTES]),
        "threads": st.integers(1, 4),
        "spaces": st.integers(0, 3),
        "seed": st.integers(0, 1000),
    }
)


def check_layout(case: dict[str, Any], directory: Path) -> None:
    torch.set_num_threads(1)
    heads = case["kv_heads"] * case["groups"]
    config = make_config(
        heads, case["kv_heads"], case["dim"], case["ffn"], case["layers"], case["vocab"], case["tied"]
    )
    model = spec(config, case["dtype"])
    if case["experts"]:
        mixture = {
            "head_dim": case["dim"],
            "num_experts": case["experts"],
            "num_experts_per_tok": 1,
            "moe_intermediate_size": case["ffn"],
            "mlp_only_layers": [0],
        }
        model = qwen3_moe.spec(config | mixture, case["dtype"])
    tp = case["tp"] if heads % case["tp"] == 0 else 1
    if case["kv_heads"] % tp and tp % case["kv_heads"]:
        tp = 1
    ep = tp if case["is_placed"] and case["experts"] % tp == 0 else 1
    topology = Topology(tp=tp, pp=min(case["pp"], case["layers"]), ep=ep)
    stages = even_stages(case["layers"], topology.pp)
    write_checkpoint(directory, model, case["on_disk"], case["shards"], case["seed"])
    for file in directory.glob("*.safetensors"):
        misalign(file, case["spaces"])
    checkpoint = read_index(directory)
    check_against(model, checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "BLOCK_BYTES", case["block"])
        patch.setattr(plan_module, "SHARE_BYTES", case["share"])
        plan = plan_load(model, checkpoint, topology, stages)
        for rank in range(topology.world_size):
            alone = plan_load(model, checkpoint, topology, stages, only=rank)
            assert alone.reads[rank] == plan.reads[rank]
            assert alone.arena_bytes == plan.arena_bytes
            assert not any(reads for other, reads in enumerate(alone.reads) if other != rank)
    check_reads(plan, model, directory)
    arenas = run_all(plan, case["threads"])
    for rank, held in enumerate(arenas):
        assert held[: plan.arena_bytes[rank]] == naive(directory, model, topology, stages, rank), (
            rank,
            topology,
        )


# A directory a test is enough: hypothesis runs its examples one after another in fresh ones below it.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=layouts)
def test_arenas_equal_naive_slices(tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]) -> None:
    check_layout(case, tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.long
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=layouts)
def test_arenas_equal_naive_slices_full(
    tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]
) -> None:
    check_layout(case, tmp_path_factory.mktemp("checkpoint"))


def medium(directory: Path, on_disk: str = "float32", tied: bool = True) -> ModelSpec:
    """A model large enough for shares to be even: about 5 MB."""
    model = spec(make_config(8, 4, 16, 512, 3, 1024, tied), "float32")
    write_checkpoint(directory, model, [on_disk], 2, 0)
    return model


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 3), (2, 3), (4, 3)])
def test_shares_are_level(tp: int, pp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "SHARE_BYTES", 4096)
    model = medium(tmp_path)
    topology = Topology(tp=tp, pp=pp)
    plan = plan_load(model, read_index(tmp_path), topology, even_stages(3, pp))
    for stage in range(pp):
        loads = [plan.bytes_read(rank) for rank in topology.tp_group(stage)]
        assert max(loads) - min(loads) <= 4 * 4096, loads
    if tp == 1 and pp == 1:
        assert plan.exchanged_bytes == 0
        assert all(read.is_direct for read in plan.reads[0])
    else:
        # Rows that two ranks of different stages share (tied embedding) are level between these too.
        ends = [
            plan.bytes_read(r)
            for r in range(topology.world_size)
            if topology.is_first(r) or topology.is_last(r)
        ]
        assert max(ends) - min(ends) <= 4 * 4096, ends


def test_a_slice_is_read_by_its_owner_and_replicas_once(tmp_path: Path) -> None:
    model = medium(tmp_path)
    topology = Topology(tp=8)  # 4 KV heads: each is held by two ranks
    plan = plan_load(model, read_index(tmp_path), topology, (range(3),))
    readers: dict[str, set[int]] = {}
    for mine in plan.reads:
        for read in mine:
            for p in read.placements:
                readers.setdefault(p.tensor, set()).add(read.rank)
                if p.tensor.endswith(("q_proj.weight", "gate_proj.weight", "embed_tokens.weight")):
                    assert p.rank == read.rank
    assert len(readers["model.norm.weight"]) == 1
    check_reads(plan, model, tmp_path)


def test_preadv_reads_each_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = medium(tmp_path)
    topology = Topology(tp=4, pp=2)
    plan = plan_load(model, read_index(tmp_path), topology, even_stages(3, 2))
    real, lock, seen = os.preadv, threading.Lock(), Counter[tuple[int, int]]()

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        limited = [buffers[0][: max(1, len(buffers[0]) // 2)]]  # short reads are usual on some file systems
        count = real(fd, limited, offset)
        with lock:
            seen.update((os.fstat(fd).st_ino, at) for at in range(offset, offset + count, 4))
        return count

    monkeypatch.setattr(reader.os, "preadv", counted)
    run_all(plan, 3)
    assert set(seen.values()) == {1}


def test_full_size_blocks(tmp_path: Path) -> None:
    """Tensors larger than a block, with real block sizes, converted and strided."""
    torch.set_num_threads(1)
    model = spec(make_config(4, 2, 64, 4096, 1, 9000, False), "bfloat16")
    write_checkpoint(tmp_path, model, ["float32", "bfloat16"], 1, 3)
    topology = Topology(tp=2)
    plan = plan_load(model, read_index(tmp_path), topology, (range(1),))
    assert max(r.length for mine in plan.reads for r in mine) <= plan_module.BLOCK_BYTES
    for rank, held in enumerate(run_all(plan)):
        assert held[: plan.arena_bytes[rank]] == naive(tmp_path, model, topology, (range(1),), rank)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def prepared(directory: Path) -> tuple[LoadPlan, dict[int, memoryview]]:
    plan = plan_load(medium(directory), read_index(directory), Topology(), (range(3),))
    return plan, {0: memoryview(bytearray(plan.arena_bytes[0]))}


def test_no_thread_is_left_and_the_first_error_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, arenas = prepared(tmp_path)
    real, calls = os.preadv, []

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    before, open_before = set(threading.enumerate()), open_files()
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(reader.os, "preadv", failing)
    with pytest.raises(
        StorageError, match=r"model-\d\.safetensors: tensor \S+ cannot be read.*Input/output"
    ):
        load(plan, 0, arenas, 4)
    assert set(threading.enumerate()) == before
    assert open_files() == open_before


def test_a_file_truncated_under_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, arenas = prepared(tmp_path)
    monkeypatch.setattr(reader.os, "preadv", lambda *_: 0)
    with pytest.raises(ModelFormatError, match="bytes early") as caught:
        load(plan, 0, arenas)
    assert caught.value.field is not None
    assert caught.value.field.startswith("model.")


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_file_that_changes(when: str, tmp_path: Path) -> None:
    plan, arenas = prepared(tmp_path)
    victim = plan.files[0].path

    def change(_: int = 0) -> None:
        os.utime(victim, ns=(0, 12345))

    if when == "before":
        change()
    with pytest.raises(StorageError, match="changed while it was being loaded"):
        load(plan, 0, arenas, 1, change)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    plan, arenas = prepared(tmp_path)
    Path(plan.files[1].path).unlink()
    before = open_files()
    with pytest.raises(ModelFormatError, match="missing"):
        load(plan, 0, arenas)
    assert open_files() == before


def test_an_error_of_the_callback_ends_the_load(tmp_path: Path) -> None:
    plan, arenas = prepared(tmp_path)

    def refuse(done: int) -> None:
        raise ValueError(f"enough at {done}")

    with pytest.raises(ValueError, match="enough at"):
        load(plan, 0, arenas, 2, refuse)


def test_read_sizes(tmp_path: Path) -> None:
    """Reads of an uncut model are few: neighbours are joined up to a block."""
    model = medium(tmp_path)
    plan = plan_load(model, read_index(tmp_path), Topology(), (range(3),))
    assert len(plan.reads[0]) <= math.ceil(plan.total_bytes / plan_module.BLOCK_BYTES) + 2 * len(plan.files)


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("shape", "dim"), [((4, 6, 10), 0), ((4, 6, 10), 1), ((4, 6, 10), 2), ((7, 3), 1), ((9,), 0)]
)
def test_tensors_of_any_rank(shape: tuple[int, ...], dim: int, tp: int, tmp_path: Path) -> None:
    """Cuts that fused experts will need: any dimension of three, padded where it does not divide."""
    cut = Cut(dim=dim, unit="row", pad=True)
    parameters = (
        ParameterSpec("cut", (Segment("a", shape, shape[dim]),), "float32", layer=0, cut=cut),
        ParameterSpec("whole", (Segment("b", shape),), "bfloat16", layer=0),
    )
    model = msgspec.structs.replace(
        spec(make_config(4, 4, 2, 3, 1, 5, True), "float32"), parameters=parameters
    )
    write_checkpoint(tmp_path, model, ["float32", "bfloat16"], 1, 0)
    topology = Topology(tp=tp)
    plan = plan_load(model, read_index(tmp_path), topology, (range(1),))
    check_reads(plan, model, tmp_path)
    for rank, held in enumerate(run_all(plan)):
        assert held[: plan.arena_bytes[rank]] == naive(tmp_path, model, topology, (range(1),), rank)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 4)])
def test_experts_lie_one_after_another(tmp_path: Path, tp: int, ep: int) -> None:
    """A tensor an expert and projection, stacked; 3 and 4 ranks do not divide 10 inner features."""
    experts, inner, hidden = 4, 10, 4

    def name(expert: int, projection: str) -> str:
        return f"experts.{expert}.{projection}_proj.weight"

    gate_up, down = (
        ParameterSpec(
            "gate_up",
            tuple(
                Segment(name(e, which), (inner, hidden), inner)
                for e in range(experts)
                for which in ("gate", "up")
            ),
            "float32",
            layer=0,
            cut=Cut(dim=0, unit="row", pad=True),
            stack=experts,
        ),
        ParameterSpec(
            "down",
            tuple(Segment(name(e, "down"), (hidden, inner), inner) for e in range(experts)),
            "bfloat16",
            layer=0,
            cut=Cut(dim=1, unit="column", pad=True),
            stack=experts,
        ),
    )
    model = msgspec.structs.replace(
        spec(make_config(4, 4, 2, 3, 1, 5, True), "float32"), parameters=(gate_up, down)
    )
    write_checkpoint(tmp_path, model, ["float32", "bfloat16"], 2, 0)
    topology = Topology(tp=tp, ep=ep)
    plan = plan_load(model, read_index(tmp_path), topology, (range(1),))
    check_reads(plan, model, tmp_path)
    assert plan.exchanged_bytes == 0 or ep == 1
    tensors: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    for rank, held in enumerate(run_all(plan)):
        placed = {p.spec.name: p for p in arena(model, topology, (range(1),), rank).placed}
        width = inner if ep > 1 else -(-inner // tp)
        count = experts // ep
        assert gate_up.local_shape(topology) == (count, 2 * width, hidden)
        assert down.local_shape(topology) == (count, hidden, width)
        start = 0 if ep > 1 else min(rank * width, inner)
        features = slice(start, min(start + width, inner))
        own = features.stop - start
        found_up = torch.frombuffer(
            held, dtype=torch.float32, count=count * 2 * width * hidden, offset=placed["gate_up"].offset
        ).view(count, 2, width, hidden)
        found_down = torch.frombuffer(
            held, dtype=torch.bfloat16, count=count * hidden * width, offset=placed["down"].offset
        ).view(count, hidden, width)
        for local, e in enumerate(range(rank * count, (rank + 1) * count) if ep > 1 else range(experts)):
            for which, projection in enumerate(("gate", "up")):
                assert torch.equal(
                    found_up[local, which, :own], tensors[name(e, projection)][features].float()
                )
                assert not found_up[local, which, own:].any()
            expected = tensors[name(e, "down")][:, features].bfloat16()
            assert torch.equal(found_down[local, :, :own], expected)
            assert not found_down[local, :, own:].any()


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 4)])
def test_a_stack_that_is_one_tensor_keeps_its_order(tmp_path: Path, tp: int, ep: int) -> None:
    """[experts, in, gate | up] and [experts, inner, out]: nothing is transposed."""
    experts, inner, hidden = 4, 10, 6

    def stack(name: str, shape: tuple[int, ...], dim: int, repeats: int) -> ParameterSpec:
        cut = Cut(dim=dim, unit="inner feature", pad=True)
        segment = Segment(name, shape, inner, repeats)
        return ParameterSpec(name, (segment,), "float32", layer=0, cut=cut, stack=experts)

    gate_up = stack("gate_up", (experts, hidden, 2 * inner), 2, 2)
    down = stack("down", (experts, inner, hidden), 1, 1)
    model = msgspec.structs.replace(
        spec(make_config(4, 4, 2, 3, 1, 5, True), "float32"), parameters=(gate_up, down)
    )
    write_checkpoint(tmp_path, model, ["float32", "bfloat16"], 2, 0)
    topology = Topology(tp=tp, ep=ep)
    plan = plan_load(model, read_index(tmp_path), topology, (range(1),))
    check_reads(plan, model, tmp_path)
    if tp == 1 or ep > 1:
        # Whole experts: one run of bytes each rank, no piece of which is taken apart.
        assert all(len({p.tensor for p in r.placements}) == len(r.placements) for r in plan.reads[0])
    tensors: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118
    width, count = (inner if ep > 1 else -(-inner // tp)), experts // ep
    for rank, held in enumerate(run_all(plan)):
        placed = {p.spec.name: p.offset for p in arena(model, topology, (range(1),), rank).placed}
        mine = slice(rank * count, (rank + 1) * count) if ep > 1 else slice(0, experts)
        start = 0 if ep > 1 else min(rank * width, inner)
        features = slice(start, min(start + width, inner))
        own = features.stop - start
        found = {
            name: torch.frombuffer(held, dtype=torch.float32, count=count * n, offset=placed[name])
            for name, n in (("gate_up", 2 * width * hidden), ("down", width * hidden))
        }
        both = found["gate_up"].view(count, hidden, 2, width)
        expected = tensors["gate_up"][mine].view(count, hidden, 2, inner)[..., features]
        assert torch.equal(both[..., :own], expected)
        assert not both[..., own:].any()
        rows = found["down"].view(count, width, hidden)
        assert torch.equal(rows[:, :own], tensors["down"][mine][:, features])
        assert not rows[:, own:].any()
