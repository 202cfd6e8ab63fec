"""Top-k, top-p and min-p over one whole row, and the draw from what they leave."""

import math

import torch

from protocol.sampling import SamplingParams
from worker import noise

_FIRST_LOOK = 256
"""Tokens sorted at first for top-p; its nucleus is seldom larger."""


def draw_filtered(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> int:
    """Return the token drawn from adjusted float32 logits [vocab]: steps 3 and 4 of ``worker.sampler``."""
    scores = logits.double().div_(params.temperature)
    kept, ids = _kept(scores, params)
    noisy = kept + noise.gumbel(seed, position, noise.hash_ids(ids))
    # Candidates are not in order of id, and equals go to the lowest.
    return int(ids[noisy == noisy.max()].min())


def _kept(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores and ids that the filters leave."""
    count = len(scores)
    has_top_k = 0 < params.top_k < count
    highest = scores.max()
    if has_top_k:
        values, ids = _head(scores, params.top_k)
    elif params.top_p < 1.0:
        values, ids = _nucleus_head(scores, params.top_p)
    else:
        ids = (scores >= highest + math.log(params.min_p)).nonzero()[:, 0]
        return scores[ids], ids
    if params.top_p < 1.0:
        weights = (values - highest).exp_()
        total = weights.sum() if has_top_k else (scores - highest).exp_().sum()
        # The mass up to and with each token never falls: the first to reach top_p is the last one kept.
        short = weights.cumsum(0) < params.top_p * total
        size = min(int(short.sum()) + 1, len(values))
        values, ids = values[:size], ids[:size]
    if params.min_p > 0.0:
        is_kept = values >= highest + math.log(params.min_p)
        values, ids = values[is_kept], ids[is_kept]
    return values, ids


def _nucleus_head(scores: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the highest scores and their ids, in order, at least as many as top-p keeps."""
    highest = scores.max()
    needed = top_p * (scores - highest).exp_().sum()
    count = min(_FIRST_LOOK, len(scores))
    while True:
        values = scores.topk(count).values
        # A token more than the mass needs, so that rounding in another order of summing cannot matter.
        if count == len(scores) or (values[:-1] - highest).exp_().sum() > needed:
            return _down_to(scores, values[-1])
        count = min(16 * count, len(scores))


def _head(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``count`` highest scores and their ids, in order, lowest id first among equals."""
    values, ids = _down_to(scores, scores.topk(count, sorted=False).values.min())
    return values[:count], ids[:count]


def _down_to(scores: torch.Tensor, border: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # torch.topk promises nothing about which of equals it takes, so all of them are taken and sorted.
    ids = (scores >= border).nonzero()[:, 0]
    values, order = scores[ids].sort(descending=True, stable=True)
    return values, ids[order]
