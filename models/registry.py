"""From a model directory to its ``ModelSpec``: the list of architectures that tandem serves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from models import deepseek, llama, llama4, qwen3, qwen3_moe
from models.spec import ModelSpec
from protocol.errors import ModelFormatError, StorageError, UnsupportedModelError

MAX_CONFIG_BYTES = 4 << 20
SERVED_DTYPES = ("float32", "bfloat16")
KV_DTYPES = ("auto", "bfloat16", "float8")
"""What keys and values may be stored in; ``auto`` is the dtype that is computed in."""

_ARCHITECTURES: dict[str, Callable[[dict[str, Any], str], ModelSpec]] = {
    name: module.spec
    for module in (llama, deepseek, qwen3, qwen3_moe, llama4)
    for name in module.ARCHITECTURES
}


def read_config(directory: Path) -> dict[str, Any]:
    """Return a directory's ``config.json``.

    Errors: ``StorageError`` where it cannot be read, ``ModelFormatError`` where it is no JSON object.
    """
    path = directory / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelFormatError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes", field="config.json")
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read ({error.strerror}): a model directory holds config.json, "
            "tokenizer.json and *.safetensors"
        ) from None
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelFormatError(f"{path}: {error}", field="config.json") from None


def load_spec(directory: Path, dtype: str = "float32", kv_dtype: str = "auto") -> ModelSpec:
    """Return the model of a directory, computed in ``dtype``, its KV stored in ``kv_dtype``.

    Errors: those of ``read_config``; those of ``build_spec``.
    """
    return build_spec(read_config(directory), str(directory / "config.json"), dtype, kv_dtype)


def build_spec(
    raw: dict[str, Any], where: str, dtype: str = "float32", kv_dtype: str = "auto"
) -> ModelSpec:
    """Return the model that the ``config.json`` at ``where`` describes, in the same way.

    Errors: ``ModelFormatError`` for a malformed one; ``UnsupportedModelError`` listing what is known.
    """
    if dtype not in SERVED_DTYPES:
        raise UnsupportedModelError(
            f"dtype {dtype!r} is not served: {', '.join(SERVED_DTYPES)} are", field="dtype"
        )
    if kv_dtype not in KV_DTYPES:
        raise UnsupportedModelError(
            f"KV in {kv_dtype!r} is not served: {', '.join(KV_DTYPES)} are", field="kv_dtype"
        )
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelFormatError(
            f"{where}: architectures must be a list with a name in it, not {names!r}",
            field="architectures",
        )
    build = _ARCHITECTURES.get(names[0])
    if build is None:
        raise UnsupportedModelError(
            f"architecture {names[0]!r} is not served: {', '.join(sorted(_ARCHITECTURES))} are",
            field="architectures",
        )
    spec = build(raw, dtype)
    if kv_dtype == "auto":
        return spec
    groups = tuple(msgspec.structs.replace(group, dtype=kv_dtype) for group in spec.kv_groups)
    return msgspec.structs.replace(spec, kv_groups=groups)
