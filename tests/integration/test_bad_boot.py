"""What cannot be served is refused by name, and nothing of it stays."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import InvalidRequestError
from tests.server import Place, served
from tests.tiny_llama import write_tiny_llama

SMALL = ("--memory", "0.7")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("cache")) as place:
        yield place


def header(model: Path) -> tuple[dict[str, Any], bytes]:
    content = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors, data = header(model)
        change(tensors)
        encoded = json.dumps(tensors).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)

    return apply


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def overlap(tensors: dict[str, Any]) -> None:
    first, second = sorted(
        (entry for name, entry in tensors.items() if name != "__metadata__"),
        key=lambda entry: entry["data_offsets"],
    )[:2]
    second["data_offsets"] = first["data_offsets"]
    second["shape"] = first["shape"]


def lie_about_the_dtype(tensors: dict[str, Any]) -> None:
    tensors[NORM]["dtype"] = "I32"


def lie_about_the_shape(tensors: dict[str, Any]) -> None:
    tensors[NORM]["shape"] = [2, tensors[NORM]["shape"][0] // 2]


def rename(new: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[new] = tensors.pop(NORM)

    return change


def add(tensors: dict[str, Any]) -> None:
    end = max(entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__")
    tensors["model.extra.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}


def configure(**changes: Any) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "truncated": (truncate, "model_format", "model.safetensors"),
    "overlapping": (with_header(overlap), "model_format", "model.safetensors"),
    "another dtype": (with_header(lie_about_the_dtype), "model_format", NORM),
    "another shape": (with_header(lie_about_the_shape), "model_format", NORM),
    "a missing tensor": (with_header(rename("model.other.weight")), "model_format", NORM),
    "an unexpected tensor": (with_header(add), "model_format", "model.extra.weight"),
    "no config": (lambda m: (m / "config.json").unlink(), "storage", "config.json"),
    "a config that is no JSON": (
        lambda m: (m / "config.json").write_text("{"),
        "model_format",
        "config.json",
    ),
    "an unknown architecture": (
        configure(architectures=["GPT2LMHeadModel"]),
        "unsupported_model",
        "LlamaForCausalLM",  # what is known is listed
    ),
    "a config of another size than the tensors": (
        configure(intermediate_size=96),
        "model_format",
        "model.layers.0.mlp",
    ),
    "a config of fewer layers than the tensors": (
        configure(num_hidden_layers=1),
        "model_format",
        "model.layers.1.",
    ),
    "an unknown kind of rope": (
        configure(rope_scaling={"rope_type": "spiral", "factor": 2.0}),
        "unsupported_model",
        "spiral",
    ),
    "a tokenizer that is none": (
        lambda m: (m / "tokenizer.json").write_text("{}"),
        "model_format",
        "tokenizer.json",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_is_not_served(place: Place, tiny: Path, tmp_path: Path, what: str) -> None:
    breaks, code, named = BROKEN[what]
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    breaks(model)
    error = place.refusal("serve", "--model", str(model), "--name", "broken", *SMALL)
    assert error["code"] == code
    assert named in error["message"]
    assert "broken" not in place.running()
    assert not (place.root / "broken").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        (("--model", "no-such-model"), "unknown_model", "model"),
        (("--model", "TINY", "--tp", "3"), "impossible_layout", "tp"),
        (("--model", "TINY", "--pp", "99"), "impossible_layout", "pp"),
        (("--model", "TINY", "--tp", "2", "--ep", "2"), "impossible_layout", "ep"),
        (("--model", "TINY", "--tp", "2", "--dcp", "2"), "impossible_layout", "dcp"),
        (("--model", "TINY", "--tp", "4", "--dcp", "4"), "impossible_layout", "dcp"),
        (("--model", "TINY", "--tp", "4", "--pp", "2", "--ep", "3"), "impossible_layout", "ep"),
        (("--model", "TINY", "--memory", "0.01"), "does_not_fit", "memory"),
        (("--model", "TINY", "--memory", "1000000"), "does_not_fit", "memory"),
        (("--model", "TINY", "--context", "100000"), "does_not_fit", "context"),
        (("--model", "TINY", "--max-rows", "600"), "invalid_request", "step_tokens"),
        (("--model", "TINY", "--devices", "tpu"), "invalid_request", "devices"),
        (("--model", "TINY", "--devices", "cpu,cuda:0"), "invalid_request", "devices"),
        (("--model", "TINY", "--max-restarts", "1"), "invalid_request", "max_restarts"),
        (("--model", "TINY", "--name", "../x"), "invalid_request", "name"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    place: Place, tiny: Path, arguments: tuple[str, ...], code: str, field: str
) -> None:
    before = place.running()
    error = place.refusal("serve", *(str(tiny) if a == "TINY" else a for a in arguments))
    assert (error["code"], error["field"]) == (code, field)
    assert place.running() == before


def test_a_boot_report_that_cannot_be_written(place: Place, tiny: Path) -> None:
    missing = place.path / "no-such-directory" / "boot.json"
    error = place.refusal("serve", "--model", str(tiny), "--boot-report", str(missing), *SMALL)
    assert (error["code"], error["field"]) == ("storage", "boot_report")
    assert str(missing) in error["message"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    # A file in the place of the directory: nobody can write there, root neither.
    in_the_way = tmp_path / "cache"
    in_the_way.write_text("")
    with Place(in_the_way) as place:
        for command in (("serve", "--model"), ("pull",)):
            error = place.refusal(*command, "smollm2-135m")
            assert (error["code"], error["field"]) == ("storage", "cache")
            assert str(in_the_way) in error["message"]


def test_a_runtime_directory_that_is_not_private(tmp_path: Path, tiny: Path) -> None:
    with Place(tmp_path) as place:
        place.root.mkdir(mode=0o755)
        assert place.refusal("serve", "--model", str(tiny))["code"] == "storage"


def test_a_template_without_an_end_fails_its_request_alone(tiny: Path, tmp_path: Path) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    loops = "{% if messages[0]['content'] == 'loop' %}" + endless + "{% else %}hi{% endif %}"
    model = write_tiny_llama(tmp_path / "endless", template=loops)
    with served(model, *SMALL, name="endless") as server, server.client() as client:
        with pytest.raises(InvalidRequestError, match="chat template took more than"):
            client.chat([{"role": "user", "content": "loop"}], max_tokens=2)
        said = client.chat([{"role": "user", "content": "hello"}], max_tokens=2, ignore_eos=True)
        assert len(said.token_ids) == 2
