"""What a checkpoint holds: the headers of its safetensors files, read as hostile input.

Format: https://huggingface.co/docs/safetensors (a little-endian u64 length, that many bytes of JSON,
then the tensors without holes). Several files are joined by ``model.safetensors.index.json``.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec

from models.spec import ModelSpec
from protocol.errors import ModelFormatError, StorageError

MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit."""
MAX_DIMENSIONS: Final = 8
INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"

DTYPE_BITS: Final = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of an element, by the name used in headers."""

SERVED_DTYPES: Final = {
    "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I32": "int32", "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip
"""Header names of what can be read, and our names for them."""
CONVERTED_DTYPES: Final = ("float32", "bfloat16", "float16")
"""Those that become one another. What is packed into others is moved as it is."""

_HEADER_THREADS: Final = 16
_NUMBERS: Final = (int, float)
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}\.safetensors")
_SHOWN = 5


class FileEntry(msgspec.Struct, frozen=True):
    """One checkpoint file, and how to notice that it is no longer the same."""

    path: str
    size: int
    mtime_ns: int


class TensorEntry(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    """As in the header: ``F32``, ``BF16``, …"""
    shape: tuple[int, ...]
    file: int
    """Index in ``Checkpoint.files``."""
    offset: int
    """First byte, from the start of the file."""
    length: int
    """Bytes."""


class Checkpoint(msgspec.Struct, frozen=True):
    """All tensors of a model directory. Built once by ``read_index``; nobody changes it."""

    directory: str
    files: tuple[FileEntry, ...]
    tensors: dict[str, TensorEntry]

    def path_of(self, tensor: TensorEntry) -> str:
        """Return the file that holds a tensor."""
        return self.files[tensor.file].path


def read_index(directory: Path) -> Checkpoint:
    """Return what the safetensors files of a directory hold; reads their headers only.

    Files are those that ``model.safetensors.index.json`` names, else ``model.safetensors``, else the
    only ``*.safetensors`` there. Links to regular files are followed.

    Errors: ``ModelFormatError`` naming file and tensor for anything that contradicts the format,
    itself or the index; ``StorageError`` for what cannot be read.
    """
    mapped = _weight_map(directory)
    names = sorted(set(mapped.values())) if mapped is not None else [_single_file(directory)]
    files: list[FileEntry] = []
    tensors: dict[str, TensorEntry] = {}
    for name, (entry, content) in zip(
        names, _read_headers([directory / name for name in names]), strict=True
    ):
        path = directory / name
        found = _tensors(path, content, len(files), entry.size)
        files.append(entry)
        for tensor in found:
            if tensor.name in tensors:
                first = files[tensors[tensor.name].file].path
                raise _bad(path, f"also holds a tensor of {first}", tensor.name)
            if mapped is not None and mapped.get(tensor.name) != name:
                where = mapped.get(tensor.name)
                says = f"is in {where!r} by" if where else "is not listed in"
                raise _bad(path, f"holds a tensor that {says} {INDEX_NAME}", tensor.name)
            tensors[tensor.name] = tensor
    for name in mapped or ():
        if name not in tensors:
            assert mapped is not None
            raise _bad(directory / mapped[name], f"lacks a tensor that {INDEX_NAME} places there", name)
    return Checkpoint(str(directory), tuple(files), tensors)


def check_against(model: ModelSpec, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is not exactly this model's.

    Every tensor that a parameter draws from must be there with its shape and the parameter's dtype, or one
    that converts to it; every other one must match ``model.skipped``.

    Errors: ``ModelFormatError`` naming file and tensor.
    """
    wanted = {s.source: (s.shape, p.dtype) for p in model.parameters for s in p.segments}
    missing = [name for name in wanted if name not in checkpoint.tensors]
    if missing:
        raise ModelFormatError(
            f"{checkpoint.directory} lacks {_some(missing)}, which config.json calls for: the download "
            "is incomplete or config.json is another model's",
            field=missing[0],
        )
    readable = {dtype: _readable(dtype) for _, dtype in wanted.values()}
    for name, (shape, dtype) in wanted.items():
        tensor = checkpoint.tensors[name]
        path = checkpoint.path_of(tensor)
        if tensor.shape != shape:
            raise _bad(path, f"has shape {list(tensor.shape)}, config.json calls for {list(shape)}", name)
        if tensor.dtype not in readable[dtype]:
            raise _bad(path, f"has dtype {tensor.dtype}; {', '.join(readable[dtype])} can be served", name)
    skipped = [re.compile(pattern) for pattern in model.skipped]
    extra = [
        name
        for name in checkpoint.tensors
        if name not in wanted and not any(pattern.fullmatch(name) for pattern in skipped)
    ]
    if extra:
        path = checkpoint.path_of(checkpoint.tensors[extra[0]])
        raise ModelFormatError(
            f"{path} holds {_some(extra)}, which {model.architecture} as config.json describes it has no "
            "place for: it is another model, or one with parts that are not served",
            field=extra[0],
        )


def _readable(dtype: str) -> list[str]:
    """Return the header names of what a parameter of ``dtype`` can be read from."""
    served = CONVERTED_DTYPES if dtype in CONVERTED_DTYPES else (dtype,)
    return [theirs for theirs, ours in SERVED_DTYPES.items() if ours in served]


def open_regular(path: str | Path) -> int:
    """Open a checkpoint file for reading and return its descriptor (the caller closes it).

    Errors: ``ModelFormatError`` for what is no regular file, ``StorageError`` for what cannot be opened.
    """
    try:
        # Without O_NONBLOCK a FIFO in a hostile directory would block for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ModelFormatError(
            f"{path} is missing: the download is incomplete, pull the model again", field=Path(path).name
        ) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}", field=Path(path).name) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelFormatError(f"{path} is no regular file", field=Path(path).name)
    return fd


def _weight_map(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_NAME
    if not path.exists() and not path.is_symlink():
        return None
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > MAX_HEADER_BYTES:
            raise _bad(path, f"has {size} bytes, more than {MAX_HEADER_BYTES}")
        content = _read(file.fileno(), 0, size, path)
    parsed = _parse(content, path, _index_strings)
    mapped = parsed.get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise _bad(path, "has no weight_map from tensor to file")
    for tensor, name in mapped.items():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise _bad(
                path, f"places it in {name!r:.100}, which is no *.safetensors file beside it", tensor
            )
    return mapped


def _single_file(directory: Path) -> str:
    try:
        found = sorted(p.name for p in directory.iterdir() if p.name.endswith(".safetensors"))
    except OSError as error:
        raise StorageError(f"{directory} cannot be read: {error.strerror}") from None
    if SINGLE_NAME in found:
        return SINGLE_NAME
    if len(found) != 1:
        what = f"{len(found)} *.safetensors files and no {INDEX_NAME}" if found else "no *.safetensors file"
        raise ModelFormatError(
            f"{directory} has {what}: a model directory holds {SINGLE_NAME}, or shards with their "
            f"{INDEX_NAME}",
            field=INDEX_NAME,
        )
    return found[0]


def _read_headers(paths: list[Path]) -> Iterator[tuple[FileEntry, bytes]]:
    """Yield what ``_read_header`` gives, in order; the drive is waited for by several threads at once."""
    if len(paths) == 1:
        yield _read_header(paths[0])
        return
    with ThreadPoolExecutor(min(len(paths), _HEADER_THREADS), "tandem-headers") as pool:
        try:
            yield from pool.map(_read_header, paths)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nobody wants the others


def _read_header(path: Path) -> tuple[FileEntry, bytes]:
    """Return a file and its header's JSON, of which only the length is checked."""
    fd = open_regular(path)
    try:
        facts = os.fstat(fd)
        if facts.st_size < 8:
            raise _bad(path, f"has {facts.st_size} bytes, fewer than the 8 of a header's length")
        length = int.from_bytes(_read(fd, 0, 8, path), "little")
        if length > MAX_HEADER_BYTES:
            raise _bad(path, f"claims a header of {length} bytes, more than {MAX_HEADER_BYTES}")
        if 8 + length > facts.st_size:
            raise _bad(path, f"claims a header of {length} bytes, the file has {facts.st_size}")
        return FileEntry(str(path), facts.st_size, facts.st_mtime_ns), _read(fd, 8, length, path)
    finally:
        os.close(fd)


def _tensors(path: Path, content: bytes, file: int, size: int) -> list[TensorEntry]:
    """Return what a header states. ``size``: bytes of its file, whose index ``file`` is."""
    header = _parse(content, path, _header_strings)
    start = 8 + len(content)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "has __metadata__ that is no map from text to text")
    found = [_tensor(path, name, raw, file, start) for name, raw in header.items()]
    _check_tiling(path, found, start, size)
    return found


def _tensor(path: Path, name: str, raw: Any, file: int, start: int) -> TensorEntry:
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, "is not described by exactly dtype, shape and data_offsets", name)
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _bad(path, f"has the unknown dtype {dtype!r:.40}", name)
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise _bad(path, f"has the shape {shape!r:.80}", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _bad(path, f"has the data_offsets {offsets!r:.80}", name)
    elements = 1
    for extent in shape:
        elements *= extent
    begin, end = offsets
    if (end - begin) * 8 != elements * bits:
        raise _bad(path, f"is {shape} of {dtype}, {elements * bits / 8:g} bytes, in {end - begin}", name)
    return TensorEntry(name, dtype, tuple(shape), file, start + begin, end - begin)


def _check_tiling(path: Path, tensors: list[TensorEntry], start: int, size: int) -> None:
    """Require that the tensors fill the file from ``start`` to ``size``: no hole, no overlap."""
    at = start
    # Empty tensors sort before the one that begins at the same byte.
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.length)):
        if tensor.offset != at:
            what = "overlaps another tensor" if tensor.offset < at else f"leaves a hole after byte {at}"
            raise _bad(path, f"begins at byte {tensor.offset} and {what}", tensor.name)
        at += tensor.length
        if at > size:
            raise _bad(path, f"ends at byte {at}, the file has {size}: it is truncated", tensor.name)
    if at != size:
        raise _bad(path, f"has {size - at} bytes after its last tensor")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _parse(content: bytes, path: Path, strings: Callable[[dict[str, Any]], int]) -> dict[str, Any]:
    """Decode a JSON object; unlike the usual decoders, refuse repeated keys and numbers JSON lacks."""
    if not content.startswith(b"{"):
        raise _bad(path, "has a header that does not begin with '{'")
    quick = _parse_quickly(content, strings)
    if quick is not None:
        return quick
    try:
        parsed = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"has a header that is no proper JSON ({str(error)[:200]})") from None
    assert isinstance(parsed, dict)
    return parsed


def _parse_quickly(content: bytes, strings: Callable[[dict[str, Any]], int]) -> dict[str, Any] | None:
    """Return what ``_parse`` would, in half the time; None where that cannot be told.

    Headers of large models have 200,000 entries. A key that stands twice is found by its quotes: without
    escapes there are two for each string, and more than for those that were kept where one was dropped.
    """
    if b"\\" in content:
        return None
    try:
        parsed = msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return parsed if content.count(b'"') == 2 * strings(parsed) else None


def _header_strings(header: dict[str, Any]) -> int:
    """Return how many strings a header has if it is a proper one."""
    metadata = header.get("__metadata__")
    # A tensor: its name, three keys and its dtype. ``_tensor`` refuses what has fewer.
    return 5 * len(header) + (_map_strings(metadata) - 4 if type(metadata) is dict else 0)


def _index_strings(index: dict[str, Any]) -> int:
    """Return how many strings an index has, or fewer where it holds more than maps of plain values."""
    return len(index) + sum(_map_strings(each) for each in index.values() if type(each) is dict)


def _map_strings(values: dict[str, Any]) -> int:
    return len(values) + sum([type(each) is str for each in values.values()])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.100} stands twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _read(fd: int, offset: int, length: int, path: Path) -> bytes:
    parts = []
    while length:
        try:
            part = os.pread(fd, length, offset)
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}", field=path.name) from None
        if not part:
            raise _bad(path, f"ends at byte {offset} while it is being read")
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def _bad(path: str | Path, what: str, tensor: str | None = None) -> ModelFormatError:
    subject = f"{path}" if tensor is None else f"{path}: tensor {tensor[:200]!r}"
    return ModelFormatError(
        f"{subject} {what}; the file is damaged or not what it seems: pull the model again",
        field=Path(path).name if tensor is None else tensor[:200],
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:_SHOWN])}{more})"
