"""What one row brings to each of its draws: parameters, counts for the penalties, bans."""

import numpy as np
import numpy.typing as npt
import torch

from protocol.control import NewRow
from protocol.sampling import SamplingParams


class _TokenCounts:
    """How often each token occurred, as arrays that grow. Owned by one ``RowSampling``."""

    def __init__(self, token_ids: list[int]) -> None:
        ids, counts = np.unique(np.array(token_ids, dtype=np.int64), return_counts=True)
        self._used = len(ids)
        self._ids: npt.NDArray[np.int64] = ids
        self._counts: npt.NDArray[np.float32] = counts.astype(np.float32)
        self._places = {token: place for place, token in enumerate(ids.tolist())}

    def add(self, token: int) -> None:
        """Count one more."""
        place = self._places.setdefault(token, self._used)
        if place == self._used:
            if place == len(self._ids):
                self._ids = np.resize(self._ids, 2 * place + 16)
                self._counts = np.resize(self._counts, 2 * place + 16)
            self._ids[place], self._counts[place] = token, 0.0
            self._used += 1
        self._counts[place] += 1.0

    def within(self, first: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens in [first, first + width) as indices from there, and their counts."""
        ids = torch.from_numpy(self._ids[: self._used]) - first
        is_here = (ids >= 0) & (ids < width)
        return ids[is_here], torch.from_numpy(self._counts[: self._used])[is_here]


class RowSampling:
    """Sampling state of one row on one rank of the last stage. Owned by the runner, by slot."""

    def __init__(
        self, params: SamplingParams, prompt: list[int], output: list[int], banned: list[int], until: int
    ) -> None:
        """``banned`` tokens are not drawn at positions below ``until``."""
        assert params.seed is not None, "the gateway draws a missing seed"
        self.params, self.seed = params, params.seed
        self._banned, self._banned_until = sorted(set(banned)), until
        self._seen = _TokenCounts(prompt + output) if params.repetition_penalty != 1.0 else None
        has_output_penalty = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._output = _TokenCounts(output) if has_output_penalty else None
        biases = sorted(params.logit_bias.items())
        self._bias_ids = torch.tensor([token for token, _ in biases], dtype=torch.int64)
        self._biases = torch.tensor([bias for _, bias in biases], dtype=torch.float32)
        self._is_always_raw = not biases and self._seen is None and self._output is None

    @classmethod
    def from_new_row(cls, new: NewRow) -> "RowSampling":
        """Return the state of a row that begins, or begins again with its answer so far."""
        prompt, output = new.token_ids[: new.num_prompt_tokens], new.token_ids[new.num_prompt_tokens :]
        return cls(new.sampling, prompt, output, new.banned_token_ids, new.banned_until)

    def append(self, token: int) -> None:
        """Take in the token that was sampled."""
        if self._seen is not None:
            self._seen.add(token)
        if self._output is not None:
            self._output.add(token)

    def is_filtered(self, vocab_size: int) -> bool:
        """Whether a draw needs the row's whole distribution."""
        params = self.params
        if params.temperature == 0.0:
            return False
        return 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0

    def is_plain(self, position: int) -> bool:
        """Whether a draw is no more than the highest of the raw logits."""
        return self.params.temperature == 0.0 and self._is_raw(position)

    def adjusted(self, logits: torch.Tensor, first: int, vocab_size: int, position: int) -> torch.Tensor:
        """Return step 1 of a draw (see ``worker.sampler``) for logits [width] of ids from ``first`` on.

        ``logits`` are returned themselves where nothing is to be adjusted; never changed.
        """
        if self._is_raw(position):
            return logits
        out, width = logits.clone(), len(logits)
        params = self.params
        if self._seen is not None:
            ids, _ = self._seen.within(first, width)
            found, penalty = out[ids], params.repetition_penalty
            out[ids] = torch.where(found > 0, found / penalty, found * penalty)
        if self._output is not None:
            ids, counts = self._output.within(first, width)
            out[ids] = out[ids] - counts * params.frequency_penalty - params.presence_penalty
        if len(self._biases):
            ids = self._bias_ids - first
            is_here = (ids >= 0) & (ids < width)
            out.index_add_(0, ids[is_here], self._biases[is_here])
        if position < self._banned_until and len(self._banned) < vocab_size:
            here = [token - first for token in self._banned if first <= token < first + width]
            out[here] = float("-inf")
        return out

    def _is_raw(self, position: int) -> bool:
        return self._is_always_raw and not (self._banned and position < self._banned_until)
