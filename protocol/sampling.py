"""What decides a draw. Travels from the client to the sampling ranks unchanged, but for the seed."""

import math
from typing import Annotated

import msgspec
from msgspec import Meta

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024

Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Parameters of one draw; the defaults sample from the model's own distribution.

    Order: penalties and bias on the raw logits, then temperature, then top-k, top-p and min-p on the
    tempered distribution. Temperature 0 is greedy (the lowest id wins a tie). Log-probabilities are
    those of the raw model distribution, before any of these.
    """

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """0: no limit."""
    min_p: Probability = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    """Over prompt and answer, multiplicative (CTRL, arXiv:1909.05858)."""
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    """Over the answer only."""
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    """Over the answer only."""
    logit_bias: Annotated[dict[int, float], Meta(max_length=MAX_LOGIT_BIAS)] = {}
    """token id -> what is added to its logit, -100 to 100."""
    seed: Seed | None = None
    """Drawn by the gateway where missing; never None at a worker."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """None: none. K: the chosen token's, and the K most likely with theirs."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    def __post_init__(self) -> None:
        # msgspec's bounds are comparisons, which NaN passes.
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, not {getattr(self, name)}")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100.0 <= bias <= 100.0:
                raise ValueError(f"logit_bias[{token}] = {bias}: ids are >= 0, biases -100 to 100")
