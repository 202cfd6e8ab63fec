"""The matrix: every tiny model over every layout that it can be cut into, and what a run takes of it.

A run takes a third, drawn by the commit that is tested, so that the next commit takes another. `--matrix
all` takes everything, `--matrix NAME` the third that the name draws.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from protocol.topology import Topology
from tests.golden import (
    test_deepseek_tiny,
    test_llama4_tiny,
    test_llama_tiny,
    test_packed_tiny,
    test_qwen3_tiny,
)
from tests.golden.scored import Answer

PARTS = 3
DEGREES = (1, 2, 4, 8)
STAGES = (1, 2, 3)
ALL = "all"


@dataclass(frozen=True)
class Model:
    """One column of the matrix."""

    kv_heads: int
    """1 for latents too, whose line is one head's."""
    experts: int = 0
    most_tp: int = 8
    divides: bool = True
    """Whether KV may be kept by position."""
    new_tokens: int = 8


MODELS = {
    "llama": Model(2, new_tokens=test_llama_tiny.NEW_TOKENS),
    "qwen3": Model(1, new_tokens=test_qwen3_tiny.NEW_TOKENS),
    "qwen3-moe": Model(2, experts=16, new_tokens=test_qwen3_tiny.NEW_TOKENS),
    "deepseek": Model(1, experts=16),
    "kimi int4": Model(1, experts=16),
    # Two of its eight heads share a block of 128.
    "deepseek float8": Model(1, experts=16, most_tp=4),
    "llama4": Model(4, experts=4, divides=False, new_tokens=test_llama4_tiny.NEW_TOKENS),
}


@dataclass(frozen=True)
class Case:
    """One cell."""

    model: str
    topology: Topology

    def __str__(self) -> str:
        return f"{self.model}, {self.topology}".replace(" ", "-")


def possible(model: Model) -> Iterator[Topology]:
    """Give the layouts that a model can be cut into, by the rules as a person would say them."""
    for tp, pp in product(DEGREES, STAGES):
        if tp > model.most_tp:
            continue
        copies = tp // min(tp, model.kv_heads)
        for ep, dcp in product({1, tp}, DEGREES):
            if ep > 1 and (not model.experts or model.experts % ep):
                continue
            if dcp > 1 and (not model.divides or copies % dcp):
                continue
            yield Topology(tp, pp, ep, dcp)


def cells() -> list[Case]:
    """Return the whole matrix."""
    return [Case(name, topology) for name, model in MODELS.items() for topology in possible(model)]


def chosen(draw: str) -> list[Case]:
    """Return what a run takes."""
    if draw == ALL:
        return cells()
    return [cell for cell in cells() if _number(f"{draw} {cell}") % PARTS == 0]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


@lru_cache
def reference(root: Path, name: str) -> tuple[Path, list[Answer]]:
    """Return a model's directory and what transformers says of every position."""
    match name:
        case "deepseek":
            return test_deepseek_tiny.tiny(root, name)
        case "kimi int4" | "deepseek float8":
            return test_packed_tiny.tiny(root, name)
        case "llama4":
            return test_llama4_tiny.tiny(root, "scout")
        case "llama":
            directory, greedy = test_llama_tiny.tiny(root, 2)
        case "qwen3":
            directory, greedy = test_qwen3_tiny.dense(root, 1)
        case _:
            directory, greedy = test_qwen3_tiny.moe(root, 2, "all sparse")
    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    answers = []
    for prompt, token_ids, _ in greedy:
        known = prompt + token_ids
        with torch.inference_mode():
            answers.append((known, model(torch.tensor([known[:-1]])).logits[0].log_softmax(-1)))
    return directory, answers
