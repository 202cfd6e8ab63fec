"""The definition in ``worker.sampler``'s docstring, row by row and without any shortcut."""

import math

import numpy as np
import torch

from protocol.sampling import SamplingParams
from worker import noise


def adjusted(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    banned: list[int],
    is_banning: bool,
) -> np.ndarray:
    """Step 1, in float32."""
    out = logits.astype(np.float32).copy()
    penalty = np.float32(params.repetition_penalty)
    for token in set(prompt) | set(output):
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    for token in set(output):
        out[token] = out[token] - np.float32(output.count(token)) * np.float32(params.frequency_penalty)
        out[token] = out[token] - np.float32(params.presence_penalty)
    for token, bias in params.logit_bias.items():
        out[token] = out[token] + np.float32(bias)
    if is_banning and len(set(banned)) < len(out):
        for token in banned:
            out[token] = -np.inf
    return out


def kept(scores: np.ndarray, params: SamplingParams) -> list[int]:
    """Step 3: the ids that the filters leave, of tempered float64 scores."""
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(scores - scores.max())
    if params.top_p < 1.0:
        total = sum(weights[token] for token in order)
        before, left = 0.0, []
        for token in order:
            if left and before >= params.top_p * total:
                break
            left.append(token)
            before += weights[token]
        order = left
    if params.min_p > 0.0:
        order = [token for token in order if scores[token] >= scores.max() + math.log(params.min_p)]
    return order


def draw(logits: np.ndarray, params: SamplingParams, position: int) -> int:
    """Steps 2 to 4, of adjusted logits."""
    if params.temperature == 0.0:
        return int(np.argmax(logits))
    scores = logits.astype(np.float64) / params.temperature
    hashed = noise.hash_ids(torch.arange(len(scores)))
    noisy = scores + noise.gumbel(params.seed or 0, position, hashed).double().numpy()
    return min(kept(scores, params), key=lambda token: (-noisy[token], token))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Of the raw logits, in float64."""
    wide = logits.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def filtered_probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution of a draw from adjusted logits."""
    scores = logits.astype(np.float64) / params.temperature
    out = np.zeros(len(scores))
    ids = kept(scores, params)
    out[ids] = np.exp(scores[ids] - scores.max())
    return out / out.sum()
