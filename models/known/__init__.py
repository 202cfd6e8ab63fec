"""Models that can be planned without being here: one small file each, named for the model.

A file holds the published ``config.json`` (what decides shapes and bytes of it) and the bytes of all
tensors as the checkpoint's index or header says. Names, shapes and dtypes of the tensors follow from the
architecture's ``ParameterSpec``; a test holds their sum against those bytes. To add a model whose
architecture ``models/`` states, add its file.
"""

from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.errors import UnknownModelError

_FOLDER: Final = Path(__file__).parent


class KnownModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One published model."""

    source: str
    """Where its files are."""
    tensor_bytes: int
    """Of the checkpoint's tensors, headers left out."""
    config: dict[str, Any]
    """Its ``config.json``."""
    skipped_bytes: int = 0
    """Of those tensors, what is known and not read (a vision tower)."""


def known_names() -> list[str]:
    """Return the names of all known models, sorted."""
    return sorted(path.name.removesuffix(".json") for path in _FOLDER.glob("*.json"))


def known_model(name: str) -> KnownModel:
    """Return a known model. Errors: ``UnknownModelError`` listing what is known."""
    if name not in known_names():
        raise UnknownModelError(
            f"{name!r} is not here, and not among the models known without their files "
            f"({', '.join(known_names())}): pull it, or give its directory",
            field="model",
        )
    return msgspec.json.decode((_FOLDER / f"{name}.json").read_bytes(), type=KnownModel)
