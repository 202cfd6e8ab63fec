"""Reads past the page cache, and what tells whether a range is in it."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from loader import climb, reader
from loader import plan as plan_module
from loader import source as source_module
from loader.index import read_index
from loader.plan import plan_load
from loader.reader import arenas_written, load
from loader.source import DIRECT_ALIGNMENT, Source
from models.layout import arena
from protocol.errors import ModelFormatError, StorageError
from protocol.topology import Topology
from tests.unit.test_loader_plan import even_stages, medium, misalign, naive, open_files, prepared


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found in the page cache, whatever the file system of the tests keeps there."""
    monkeypatch.setattr(Source, "is_cached", lambda *_: False)


def takes_direct(directory: Path) -> bool:
    path = directory / "probe"
    path.write_bytes(bytes(8192))
    source = Source(str(path))
    try:
        return source.direct_fd is not None
    finally:
        source.close()


def load_and_compare(directory: Path, topology: Topology, spaces: int = 0) -> int:
    """Return the bytes that were read past the cache."""
    model = medium(directory, "bfloat16")
    for file in directory.glob("*.safetensors"):
        misalign(file, spaces)
    stages = even_stages(3, topology.pp)
    plan = plan_load(model, read_index(directory), topology, stages)
    arenas = {rank: memoryview(bytearray(size)) for rank, size in enumerate(plan.arena_bytes)}
    uncached = 0
    for rank in arenas:
        report = load(plan, rank, {r: arenas[r] for r in arenas_written(plan, rank)})
        assert report.bytes == plan.bytes_read(rank)
        uncached += report.uncached_bytes
    for rank, held in arenas.items():
        assert arena(model, topology, stages, rank).size == len(held)
        assert held.tobytes() == naive(directory, model, topology, stages, rank)
    return uncached


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("spaces", [0, 3])
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("block", [4096, 100_000, plan_module.BLOCK_BYTES])
@pytest.mark.parametrize("topology", [Topology(), Topology(tp=4), Topology(tp=2, pp=3)])
def test_reads_past_the_cache_are_equal(
    topology: Topology,
    block: int,
    together: int,
    spaces: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", block)
    monkeypatch.setattr(climb, "LEAST_BLOCK_BYTES", block * together)
    expected = takes_direct(tmp_path)
    assert (load_and_compare(tmp_path, topology, spaces) > 0) == expected


@pytest.mark.usefixtures("cold")
def test_whole_pages_are_asked_for_and_short_reads_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = os.preadv, []

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        assert offset % DIRECT_ALIGNMENT == 0
        assert len(buffers[0]) % DIRECT_ALIGNMENT == 0
        seen.append(offset)
        # Not a multiple of a page: what is behind the last whole one is asked again.
        return real(fd, [buffers[0][: max(DIRECT_ALIGNMENT, len(buffers[0]) // 2)]], offset) - (
            5 if len(buffers[0]) > 4 * DIRECT_ALIGNMENT else 0
        )

    if not takes_direct(tmp_path):
        pytest.skip("this file system reads through its cache alone")
    monkeypatch.setattr(reader.os, "preadv", short)
    load_and_compare(tmp_path, Topology(tp=2))
    assert len(seen) > 10


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_is_read_through_its_cache(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    refused: set[int] = set()

    class Refusing(Source):
        def __init__(self, path: str) -> None:
            super().__init__(path)
            # A descriptor that opens and then does not read, as some file systems have them.
            self.direct_fd = os.open(path, os.O_RDONLY)
            self._others.append(self.direct_fd)
            refused.add(self.direct_fd)

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fd in refused:
            raise OSError(number, os.strerror(number))
        return real(fd, buffers, offset)

    monkeypatch.setattr(reader, "Source", Refusing)
    monkeypatch.setattr(reader.os, "preadv", preadv)
    before = open_files()
    assert load_and_compare(tmp_path, Topology(tp=2)) == 0
    assert open_files() == before


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("fault", ["EIO", "truncated", "half a page"])
def test_a_drive_that_fails_in_the_middle(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 65536)
    monkeypatch.setattr(climb, "LEAST_BLOCK_BYTES", 65536)
    plan, arenas = prepared(tmp_path)
    real, calls = os.preadv, [0]

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls[0] += 1
        if calls[0] <= 2:
            return real(fd, buffers, offset)
        if fault == "EIO":
            raise OSError(errno.EIO, "Input/output error")
        return 0 if fault == "truncated" else 100

    monkeypatch.setattr(reader.os, "preadv", failing)
    threads, files = set(threading.enumerate()), open_files()
    with pytest.raises(StorageError if fault == "EIO" else ModelFormatError) as caught:
        load(plan, 0, arenas, 4)
    assert "safetensors: tensor model." in str(caught.value)
    assert caught.value.field is not None
    assert caught.value.field.startswith("model.")
    assert set(threading.enumerate()) == threads
    assert open_files() == files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    return path


def drop(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("whose", ["own", "another's"])
def test_what_is_in_the_page_cache(whose: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if whose == "another's":
        monkeypatch.setattr(source_module.os, "geteuid", lambda: 12345)
        monkeypatch.setattr(source_module.os, "access", lambda *_: False)
    before = open_files()
    assert is_cached(file)
    drop(file)
    if not file_system_drops(file):
        pytest.skip("this file system keeps all its pages, as tmpfs does")
    assert not is_cached(file)
    file.read_bytes()
    assert is_cached(file)
    assert open_files() == before


def is_cached(file: Path) -> bool:
    source = Source(str(file))
    try:
        return source.is_cached(1 << 19)
    finally:
        source.close()


def file_system_drops(file: Path) -> bool:
    fd = os.open(file, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(1)], 1 << 19, os.RWF_NOWAIT) < 0
    except OSError as error:
        return error.errno == errno.EAGAIN
    finally:
        os.close(fd)


def test_looking_reads_almost_nothing_of_another_s_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module.os, "geteuid", lambda: 12345)
    monkeypatch.setattr(source_module.os, "access", lambda *_: False)
    drop(file)
    if not file_system_drops(file):
        pytest.skip("this file system keeps all its pages, as tmpfs does")
    drop(file)
    is_cached(file)
    monkeypatch.undo()
    own = Source(str(file))
    pages = [own._is_cached(page) for page in range(0, 1 << 20, source_module.PAGE)]
    own.close()
    assert sum(pages) <= source_module._SAMPLES


def test_a_fault_leaves_no_staging_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A staging that cannot be opened ends the load, too."""
    plan, arenas = prepared(tmp_path)

    def refuse(_: Any) -> Any:
        raise MemoryError("no block")

    monkeypatch.setattr(reader.HostDestination, "open", refuse)
    with pytest.raises(MemoryError, match="no block"):
        load(plan, 0, arenas, 4)


@pytest.mark.parametrize("is_cold", [False, True])
@pytest.mark.parametrize("change", ["shrinks", "grows", "is written to"])
def test_a_file_that_changes_while_it_is_read(
    change: str, is_cold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real file, changed by somebody else after the first block: no crash, and an error that names it."""
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 65536)
    monkeypatch.setattr(climb, "LEAST_BLOCK_BYTES", 65536)
    monkeypatch.setattr(Source, "is_cached", lambda *_: not is_cold)
    plan, arenas = prepared(tmp_path)
    victim = Path(plan.files[0].path)
    size = victim.stat().st_size

    def meddle(done: int) -> None:
        if change == "shrinks":
            os.truncate(victim, size // 2 + 17)
        elif change == "grows":
            os.truncate(victim, size + 1)
        else:
            with victim.open("r+b") as file:
                file.seek(size - 1)
                file.write(b"\0")

    threads, files = set(threading.enumerate()), open_files()
    with pytest.raises((ModelFormatError, StorageError), match=victim.name) as caught:
        load(plan, 0, arenas, 2, meddle)
    assert caught.value.field is not None
    assert set(threading.enumerate()) == threads
    assert open_files() == files
