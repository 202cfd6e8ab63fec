import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader import index as index_module
from loader.index import (
    INDEX_NAME,
    MAX_HEADER_BYTES,
    SINGLE_NAME,
    Checkpoint,
    check_against,
    read_index,
)
from models.llama import spec
from protocol.errors import ModelFormatError, StorageError, TandemError

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}  # fmt: skip


def safetensors_bytes(header: Any, data: int | bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = data if isinstance(data, bytes) else bytes(data)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def write(directory: Path, content: bytes, name: str = SINGLE_NAME) -> Path:
    (directory / name).write_bytes(content)
    return directory


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {"a": {"dtype": dtype, "shape": plain(shape), "data_offsets": plain(offsets)}}


def test_a_single_file(tmp_path: Path) -> None:
    header = dict(
        GOOD,
        __metadata__={"format": "pt"},
        empty={"dtype": "I8", "shape": [0, 7], "data_offsets": [24, 24]},
        scalar={"dtype": "F32", "shape": [], "data_offsets": [32, 36]},
    )
    text = json.dumps(header).encode() + b"   "
    found = read_index(write(tmp_path, safetensors_bytes(text, 36)))
    start = 8 + len(text)
    assert set(found.tensors) == {"a", "b", "empty", "scalar"}
    assert found.tensors["a"].shape == (2, 3)
    assert (found.tensors["b"].offset, found.tensors["b"].length) == (start + 24, 8)
    assert found.path_of(found.tensors["a"]) == str(tmp_path / SINGLE_NAME)
    assert found.files[0].size == start + 36


def test_the_only_file_may_have_any_name(tmp_path: Path) -> None:
    write(tmp_path, safetensors_bytes(GOOD, 32), "weights.safetensors")
    assert set(read_index(tmp_path).tensors) == {"a", "b"}
    write(tmp_path, safetensors_bytes(GOOD, 32), "more.safetensors")
    with pytest.raises(ModelFormatError, match=r"2 \*\.safetensors files"):
        read_index(tmp_path)


HOSTILE = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "length beyond the file": safetensors_bytes(GOOD, 32, 10_000),
    "length of 2^63": safetensors_bytes(GOOD, 32, 1 << 63),
    "length of 2^64 - 1": safetensors_bytes(GOOD, 32, (1 << 64) - 1),
    "length over the limit": safetensors_bytes(GOOD, 32, MAX_HEADER_BYTES + 1),
    "length zero": safetensors_bytes(b"", 32),
    "not JSON": safetensors_bytes(b"{nonsense}", 0),
    "a list": safetensors_bytes([1], 0),
    "leading space": safetensors_bytes(b" {}", 0),
    "not UTF-8": safetensors_bytes(b'{"\xff": 1}', 0),
    "deep nesting": safetensors_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0),
    "a number of 10,000 digits": safetensors_bytes(b'{"a":' + b"9" * 10_000 + b"}", 0),
    "NaN": safetensors_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', 8),
    "duplicate tensor": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
    ),
    "duplicate field": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[2],"shape":[3],"data_offsets":[0,8]}}', 8
    ),
    "unknown dtype": safetensors_bytes(one(dtype="F31"), 8),
    "dtype no text": safetensors_bytes(one(dtype=[1]), 8),
    "negative extent": safetensors_bytes(one(shape=(-2,)), 8),
    "two negative extents": safetensors_bytes(one(shape=(-2, -1)), 8),
    "boolean extent": safetensors_bytes(one(shape=(2, True)), 8),
    "fractional extent": safetensors_bytes(one(shape=(2.0,)), 8),
    "huge extents": safetensors_bytes(one(shape=(1 << 62, 1 << 62, 1 << 62)), 8),
    "extent of 2^63": safetensors_bytes(one(shape=(1 << 63,)), 8),
    "too many dimensions": safetensors_bytes(one(shape=(1,) * 1000 + (2,)), 8),
    "shape no list": safetensors_bytes(one(shape="2"), 8),
    "negative offset": safetensors_bytes(one(offsets=(-8, 0)), 8),
    "offsets swapped": safetensors_bytes(one(offsets=(8, 0)), 8),
    "one offset": safetensors_bytes(one(offsets=(8,)), 8),
    "offset of 2^63": safetensors_bytes(one(offsets=(1 << 63, (1 << 63) + 8)), 8),
    "out of range": safetensors_bytes(one(offsets=(100, 108)), 8),
    "truncated": safetensors_bytes(GOOD, 31),
    "length does not match the shape": safetensors_bytes(one(shape=(3,)), 8),
    "length does not match the dtype": safetensors_bytes(one(dtype="BF16"), 8),
    "half a byte": safetensors_bytes(one(dtype="F4", shape=(3,), offsets=(0, 1)), 1),
    "bytes after the end": safetensors_bytes(GOOD, 40),
    "hole": safetensors_bytes(dict(GOOD, b={"dtype": "BF16", "shape": [4], "data_offsets": [28, 36]}), 36),
    "hole at the start": safetensors_bytes(one(offsets=(8, 16)), 16),
    "overlap": safetensors_bytes(
        dict(GOOD, b={"dtype": "BF16", "shape": [4], "data_offsets": [20, 28]}), 32
    ),
    "missing field": safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "additional field": safetensors_bytes({"a": dict(one()["a"], x=1)}, 8),
    "entry no object": safetensors_bytes({"a": 1}, 8),
    "metadata no map": safetensors_bytes({"__metadata__": [1]}, 0),
    "metadata of numbers": safetensors_bytes({"__metadata__": {"a": 1}}, 0),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(case: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError) as caught:
        read_index(write(tmp_path, HOSTILE[case]))
    assert str(tmp_path / SINGLE_NAME) in str(caught.value)
    assert caught.value.field


def shards(directory: Path, weight_map: Any) -> Path:
    write(directory, safetensors_bytes({"a": GOOD["a"]}, 24), "one.safetensors")
    write(directory, safetensors_bytes(one(), 8).replace(b'"a"', b'"b"'), "two.safetensors")
    return write(directory, json.dumps({"metadata": {}, "weight_map": weight_map}).encode(), INDEX_NAME)


def test_shards(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    (tmp_path / "unrelated.safetensors").write_bytes(b"x")
    found = read_index(tmp_path)
    assert [Path(f.path).name for f in found.files] == ["one.safetensors", "two.safetensors"]
    assert found.tensors["b"].file == 1


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, "three.safetensors is missing"),
        ({"a": "one.safetensors", "b": "../two.safetensors"}, "'b'"),
        ({"a": "one.safetensors", "b": "/etc/passwd"}, "'b'"),
        ({"a": "one.safetensors", "b": "x/two.safetensors"}, "'b'"),
        ({"a": "one.safetensors", "b": "two.safetensors\0"}, "'b'"),
        ({"a": "one.safetensors", "b": 3}, "'b'"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "'b'"),
        ({"a": "two.safetensors", "b": "two.safetensors"}, "'b'|'a'"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "'c'"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "'a'"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_an_index_that_lies(weight_map: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=named):
        read_index(shards(tmp_path, weight_map))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    write(
        tmp_path,
        safetensors_bytes(dict(one(), b=dict(one()["a"], data_offsets=[8, 16])), 16),
        "two.safetensors",
    )
    with pytest.raises(ModelFormatError, match=r"two\.safetensors.*'a'.*one\.safetensors"):
        read_index(tmp_path)


def test_an_index_with_a_repeated_key(tmp_path: Path) -> None:
    shards(tmp_path, {})
    write(tmp_path, b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', INDEX_NAME)
    with pytest.raises(ModelFormatError, match="twice"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}, "b": 1, "c": 2}',
        b'{"weight_map": {"a": "one.safetensors", "\\u0061": "two.safetensors"}}',
        b'{"weight_map": {"a": "one.safetensors"}, "weight_map": {"b": "two.safetensors"}}',
        b'{"metadata": {"x": 1, "x": 2}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}',
    ],
)
def test_any_repeated_key_is_found(index: bytes, tmp_path: Path) -> None:
    shards(tmp_path, {})
    write(tmp_path, index, INDEX_NAME)
    with pytest.raises(ModelFormatError, match="twice"):
        read_index(tmp_path)


def test_of_many_bad_shards_the_first_is_named(tmp_path: Path) -> None:
    """Headers are read side by side; what is said does not depend on which is there first."""
    names = [f"part-{i:02}.safetensors" for i in range(40)]
    for i, name in enumerate(names):
        if i not in (7, 30):
            write(tmp_path, safetensors_bytes({f"{i:02}": one()["a"]}, 8), name)
    weight_map = {f"{i:02}": name for i, name in enumerate(names)}
    write(tmp_path, json.dumps({"weight_map": weight_map}).encode(), INDEX_NAME)
    for _ in range(5):
        with pytest.raises(ModelFormatError, match=r"part-07\.safetensors is missing"):
            read_index(tmp_path)
    for i in (7, 30):
        write(tmp_path, safetensors_bytes({f"{i:02}": one()["a"]}, 8), names[i])
    assert [t.file for t in read_index(tmp_path).tensors.values()] == list(range(40))


def test_links_and_special_files(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_bytes(safetensors_bytes(GOOD, 32))
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / SINGLE_NAME).symlink_to("../blobs/0123")
    assert set(read_index(linked).tensors) == {"a", "b"}

    for case in ("loop", "fifo", "directory", "dangling"):
        directory = tmp_path / case
        directory.mkdir()
        path = directory / SINGLE_NAME
        if case == "loop":
            path.symlink_to(SINGLE_NAME)
        elif case == "fifo":
            os.mkfifo(path)
        elif case == "directory":
            path.mkdir()
        else:
            path.symlink_to("nowhere")
        with pytest.raises((ModelFormatError, StorageError), match=SINGLE_NAME):
            read_index(directory)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(ModelFormatError, match=r"no \*\.safetensors file"):
        read_index(tmp_path)


def fuzz(count: int, directory: Path, seed: int) -> int:
    """Damage a good file in ``count`` ways; every outcome is a Checkpoint or a TandemError."""
    random_ = random.Random(seed)
    good = safetensors_bytes(dict(GOOD, __metadata__={"format": "pt"}), 32)
    words = [
        b"{",
        b"}",
        b'"',
        b",",
        b"[",
        b"]",
        b"-1",
        b"null",
        b"1e999",
        b"\xff",
        b'"F32"',
        b"18446744073709551616",
    ]
    refused = 0
    for _ in range(count):
        content = bytearray(good)
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(len(content) + 1)
            match random_.randrange(5):
                case 0:
                    content[at : at + 1] = random_.randbytes(1)
                case 1:
                    content[at:at] = random_.choice(words)
                case 2:
                    del content[at : at + random_.randint(1, 20)]
                case 3:
                    content[0:8] = random_.choice(
                        [random_.randbytes(8), random_.randrange(400).to_bytes(8, "little")]
                    )
                case 4:
                    other = random_.randrange(len(content) + 1)
                    content[at:at] = content[other : other + random_.randint(1, 40)]
        write(directory, bytes(content))
        check_quick_parse(bytes(content[8:]))
        try:
            found = read_index(directory)
        except TandemError:
            refused += 1
        else:
            assert isinstance(found, Checkpoint)
            assert all(t.offset + t.length <= len(content) for t in found.tensors.values())
    return refused


def check_quick_parse(content: bytes) -> None:
    """What the quick parser takes of a proper header is what the strict one takes."""
    quick = index_module._parse_quickly(content, index_module._header_strings)
    if quick is None:
        return
    try:
        strict = json.loads(content, object_pairs_hook=index_module._unique)
    except ValueError:
        strict = None
    if quick == strict:
        return
    # It may have dropped a key only where the header is refused anyway.
    quick.pop("__metadata__", None)
    with pytest.raises(ModelFormatError):
        _ = [index_module._tensor(Path("x"), name, raw, 0, 0) for name, raw in quick.items()]


def fuzz_index(count: int, directory: Path, seed: int) -> int:
    """Damage an index and its shards; every outcome is a Checkpoint or a TandemError that names a file."""
    random_ = random.Random(seed)
    shards(directory, {"a": "one.safetensors", "b": "two.safetensors"})
    names = [INDEX_NAME, "one.safetensors", "two.safetensors"]
    good = {name: (directory / name).read_bytes() for name in names}
    words = [b"a", b"b", b"one", b"two", b"..", b"/", b'"', b"\\u0061", b"three", b"{", b"}", b"\0", b"1"]
    said: list[str] = []
    for _ in range(count):
        name = random_.choice(names)
        content = bytearray(good[name])
        for _ in range(random_.randint(1, 3)):
            at = random_.randrange(len(content) + 1)
            if random_.random() < 0.5:
                content[at : at + random_.randrange(3)] = random_.choice(words)
            else:
                other = random_.randrange(len(content) + 1)
                content[at:at] = content[other : other + random_.randint(1, 40)]
        write(directory, bytes(content), name)
        try:
            found = read_index(directory)
        except TandemError as error:
            said.append(str(error))
        else:
            assert all(t.offset + t.length <= found.files[t.file].size for t in found.tensors.values())
            assert all(Path(f.path).parent == directory for f in found.files)
        write(directory, good[name], name)
    assert all(str(directory) in one for one in said)
    return len(said)


def test_fuzzed_indices(tmp_path: Path) -> None:
    assert fuzz_index(1_000, tmp_path, 1) > 500


@pytest.mark.long
def test_fuzzed_indices_full(tmp_path: Path) -> None:
    assert fuzz_index(20_000, tmp_path, 2) > 10_000


def test_fuzzed_headers(tmp_path: Path) -> None:
    assert fuzz(2_000, tmp_path, 1) > 1_000


@pytest.mark.long
def test_fuzzed_headers_full(tmp_path: Path) -> None:
    assert fuzz(50_000, tmp_path, 2) > 25_000


@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.mktemp("any")
    try:
        found = read_index(write(directory, content))
    except ModelFormatError:
        return
    assert content[8:].startswith(b"{")
    assert not found.tensors


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 5,
    "tie_word_embeddings": True,
}


def llama_header(**changes: Any) -> tuple[dict[str, Any], int]:
    model = spec(CONFIG, "float32")
    shapes = {s.source: list(s.shape) for p in model.parameters for s in p.segments}
    shapes |= {k.replace("__", "."): v for k, v in changes.items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        if shape is None:
            continue
        dtype, width = ("F32", 4) if not isinstance(shape, tuple) else ("I32", 4)
        size = width
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header, at


@pytest.mark.parametrize(
    ("changes", "message", "field"),
    [
        ({"model__norm__weight": None}, "lacks 1 tensor", "model.norm.weight"),
        ({"model__norm__bias": [8]}, "holds 1 tensor", "model.norm.bias"),
        ({"model__norm__weight": [9]}, r"has shape \[9\]", "model.norm.weight"),
        ({"model__norm__weight": (8,)}, "has dtype I32", "model.norm.weight"),
    ],
)
def test_a_checkpoint_of_another_model(changes: Any, message: str, field: str, tmp_path: Path) -> None:
    found = read_index(write(tmp_path, safetensors_bytes(*llama_header(**changes))))
    with pytest.raises(ModelFormatError, match=message) as caught:
        check_against(spec(CONFIG, "float32"), found)
    assert caught.value.field == field


def test_tensors_known_and_skipped(tmp_path: Path) -> None:
    changes = {"lm_head__weight": [5, 8], "model__layers__0__self_attn__rotary_emb__inv_freq": [4]}
    changes = {k.replace("self__attn", "self_attn"): v for k, v in changes.items()}
    found = read_index(write(tmp_path, safetensors_bytes(*llama_header(**changes))))
    check_against(spec(CONFIG, "float32"), found)
