"""The rooms' import rules and the ban list, read from the source itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("protocol", "models", "tandem", "kv", "loader", "worker", "orchestrator", "cli")
ALLOWED = {
    "protocol": set(),
    "models": {"protocol"},
    "tandem": {"protocol"},
    "kv": {"protocol", "models"},
    "loader": {"protocol", "models"},
    "worker": {"protocol", "models", "kv", "loader"},
    "orchestrator": {
        *("protocol", "models", "kv", "loader.hub", "loader.index", "loader.plan", "loader.load_summary"),
    },
    "cli": {"tandem", "orchestrator", "protocol", "models", "loader.hub"},
}
TORCH_FREE = ("protocol", "models", "tandem", "orchestrator", "cli")
OUTSIDE = {"protocol": {"msgspec"}}
"""Third-party packages of a room, where the design limits them."""


def sources(room: str) -> list[Path]:
    return [ROOT / "cli.py"] if room == "cli" else sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            assert node.module is not None
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def within(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    for path in sources(room):
        for name in imported(path):
            top = name.split(".")[0]
            if top in ROOMS and top != room:
                assert within(name, ALLOWED[room]), f"{path.relative_to(ROOT)} imports {name}"
            if name.startswith("kv.tensors"):
                assert room == "worker", f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", TORCH_FREE)
def test_no_torch_in(room: str) -> None:
    for path in sources(room):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"torch", "transformers", "cupy"}, path


def test_kv_keeps_torch_in_one_module() -> None:
    with_torch = [p.name for p in sources("kv") if "torch" in {n.split(".")[0] for n in imported(p)}]
    assert with_torch in ([], ["tensors.py"])


def test_protocol_stands_on_msgspec_alone() -> None:
    for path in sources("protocol"):
        tops = {name.split(".")[0] for name in imported(path)} - {"protocol", "msgspec"}
        assert tops <= set(sys.stdlib_module_names), path


@pytest.mark.parametrize("module", ["orchestrator.serve", "cli", "tandem", "loader.hub", "models.memory"])
def test_importing_brings_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=30
    )
    assert done.stdout.strip() == "[]", done.stderr


BANNED = {
    "pickle": r"^\s*(?:import|from)\s+(?:pickle|dill|cloudpickle|shelve|marshal)\b",
    "pickled sockets": r"\b(?:send|recv)_pyobj\b",
    "torch.load": r"\btorch\.load\b",
    "remote code": r"trust_remote_code",
    "eval": r"(?<![\w.])eval\(",
    "exec": r"(?<![\w.])exec\(",
}


@pytest.mark.parametrize("what", BANNED)
def test_banned(what: str) -> None:
    pattern = re.compile(BANNED[what], re.MULTILINE)
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        if relative.parts[0].startswith(".") or path == Path(__file__):
            continue
        assert not pattern.search(path.read_text()), f"{relative}: {what}"


ENVIRONMENT = re.compile(r"\bos\.(?:environ|getenv)\b")


def test_the_environment_is_read_in_cli_alone() -> None:
    for room in ROOMS:
        if room != "cli":
            for path in sources(room):
                # The SDK has no command line above it: it finds the runtime directory by itself.
                if path.relative_to(ROOT) != Path("tandem/discovery.py"):
                    assert not ENVIRONMENT.search(path.read_text()), path.relative_to(ROOT)
