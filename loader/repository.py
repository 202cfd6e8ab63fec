"""A model from the Hugging Face hub: weights, configuration and tokenizer, never code."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loader.catalogue import HubModel
from protocol.errors import DownloadError, UnknownModelError, UnsupportedModelError

if TYPE_CHECKING:
    from loader.hub import PullProgress

WANTED: Final = (
    "*.safetensors", "*.json", "*.jinja", "*.tiktoken", "tiktoken.model", "tokenizer.model",
    "merges.txt", "vocab.txt", "LICENSE", "LICENSE.txt", "LICENSE.md",
)  # fmt: skip
UNWANTED: Final = ("*.py", "*/*", "consolidated*")
"""Also folders (other formats of the same weights) and Mistral's second copy."""


def fetch_repository(
    source: HubModel, hub_cache: Path, report: "PullProgress", endpoint: str | None = None
) -> Path:
    """Return the snapshot of a repository below ``hub_cache``; an interrupted one is resumed.

    Errors: ``UnknownModelError`` for a repository that is not there or not open to this user,
    ``UnsupportedModelError`` for one without safetensors, ``DownloadError`` for the rest; the disk's
    ``OSError`` passes.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name = source.repository
    report("downloading", 0, 0)
    try:
        found = snapshot_download(
            name,
            cache_dir=hub_cache,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
            tqdm_class=_reporting_bar(report),
            endpoint=endpoint,
        )
    except GatedRepoError:
        raise UnknownModelError(
            f"{name} is open only to those who accept its licence: do so at https://huggingface.co/{name} "
            "and log in (hf auth login)",
            field="model",
        ) from None
    except RepositoryNotFoundError:
        raise UnknownModelError(
            f"there is no Hugging Face repository {name}, or it is private: check the name, or log in "
            "(hf auth login)",
            field="model",
        ) from None
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise  # the disk's refusal; the network's have no file name
        raise DownloadError(f"{name} could not be fetched: {error}") from error
    except Exception as error:  # the client's transport raises kinds of its own
        raise DownloadError(f"{name} could not be fetched: {error}") from error
    directory = Path(str(found))
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise UnsupportedModelError(
            f"the repository {name} holds no config.json with *.safetensors beside it; other formats are "
            "not served",
            field="model",
        )
    return directory


def _reporting_bar(report: "PullProgress") -> type[Any]:
    """Return a progress bar class that draws nothing and reports the bytes of one download.

    The client makes several bars (bytes received, bytes written, files); the furthest in bytes counts.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    bars: list[Any] = []

    class ReportingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})
            if self._counts_bytes:
                bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts_bytes and n:
                self.n += n
                report(
                    "downloading", int(max(bar.n for bar in bars)), int(max(bar.total or 0 for bar in bars))
                )
            return None

    return ReportingBar
