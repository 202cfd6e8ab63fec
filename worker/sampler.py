"""Draws tokens from logits that are cut by vocabulary over a tensor-parallel group.

What a draw is, exactly (all layouts and batches agree bit for bit, given the same logits):

1. In float32, per token: a logit above 0 of a token seen in prompt or answer is divided by
   repetition_penalty, one at or below 0 multiplied by it (CTRL, arXiv:1909.05858); then
   frequency_penalty × its count in the answer is subtracted, then presence_penalty if it stands there;
   then logit_bias is added; then a banned token gets -inf (but where every token is banned, none is).
2. temperature 0: the highest is taken, and nothing below applies. Ties go to the lowest id, here as
   everywhere.
3. Else logits / temperature in float64, in order of descending value: top_k keeps the first k; top_p
   keeps, of those, each token before which less than top_p of their probability stands (so at least
   one); min_p keeps, of those, each whose probability is at least min_p × the highest.
4. Of what is left, the highest after adding Gumbel noise of (seed, position, id) is taken.

Log-probabilities are those of the logits before all of this, normalised in float64.

A filter needs a row whole: the adjusted rows that have one are gathered, at most ``logit_rows`` at a
time, and dealt to the ranks of the group. All other rows cost one small all-gather together.
"""

from dataclasses import dataclass

import torch

from protocol.control import TokenLogprobs
from protocol.errors import TandemError
from worker import noise
from worker.comm import Communicator
from worker.sampling_filters import draw_filtered
from worker.sampling_rows import RowSampling

__all__ = ["NonFiniteLogitsError", "RowSampling", "Sampled", "Sampler"]

_NEVER = float("-inf")


class NonFiniteLogitsError(TandemError):
    """Rows whose logits hold NaN or +inf, or nothing above -inf. Raised on every rank of the group.

    ``rows`` are indices into the call's rows; who called knows their slots.
    """

    code = "non_finite_logits"

    def __init__(self, rows: list[int]) -> None:
        super().__init__(
            f"logits of rows {rows} of this call are not finite: the weights are damaged, or the dtype "
            "is too narrow for this model (try float32)"
        )
        self.rows = rows


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, and its log-probabilities where the row asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Sampler of one rank. Holds no state between calls; the rows' state is the caller's."""

    def __init__(self, vocab_size: int, comm: Communicator, logit_rows: int) -> None:
        """``logit_rows``: the most rows of whole logits that may exist at a time."""
        topology = comm.topology
        self._comm, self._vocab_size, self._logit_rows = comm, vocab_size, logit_rows
        self._tp, self._tp_rank = topology.tp, topology.tp_rank(comm.rank)
        self._room = -(-vocab_size // self._tp)
        self._first = min(self._tp_rank * self._room, vocab_size)
        self._width = min(self._first + self._room, vocab_size) - self._first
        ids = torch.arange(self._first, self._first + self._width)
        self._hashed_ids = noise.hash_ids(ids)

    def sample(self, logits: torch.Tensor, rows: list[RowSampling], positions: list[int]) -> Sampled:
        """Draw the token at ``positions[i]`` (how many tokens row i knows) for each row.

        ``logits``: float32 [rows, room], this rank's ids from tp_rank × room on, room = ceil(vocab / tp);
        columns past the vocabulary are ignored. Not changed. The result is the same on all ranks of the
        group, which all call with the same rows. The rows are told their tokens by the caller.
        Errors: ``NonFiniteLogitsError``; ``CollectiveError``.
        """
        if not rows:
            return Sampled([], [])
        local = self._local(logits, len(rows))
        filtered = [i for i, row in enumerate(rows) if row.is_filtered(self._vocab_size)]
        token_ids = self._draw_unfiltered(local, rows, positions, set(filtered))
        for start in range(0, len(filtered), self._logit_rows):
            some = filtered[start : start + self._logit_rows]
            drawn = self._draw_filtered(local, rows, positions, some)
            for i, token in zip(some, drawn, strict=True):
                token_ids[i] = token
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        if asked:
            counts = [rows[i].params.logprobs or 0 for i in asked]
            whole = local if len(asked) == len(rows) else local[asked]
            for i, found in zip(
                asked, self._logprobs(whole, [token_ids[i] for i in asked], counts), strict=True
            ):
                logprobs[i] = found
        return Sampled(token_ids, logprobs)

    def score(self, logits: torch.Tensor, token_ids: list[int], k: int) -> list[TokenLogprobs]:
        """Return the log-probability of ``token_ids[i]`` under row i of ``logits``, and the k highest.

        Shapes and errors as for ``sample``.
        """
        if not token_ids:
            return []
        local = self._local(logits, len(token_ids))
        return self._logprobs(local, token_ids, [k] * len(token_ids))

    def _local(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        assert logits.shape == (count, self._room), f"{tuple(logits.shape)} for {count} rows"
        assert logits.dtype == torch.float32
        return logits[:, : self._width]

    def _draw_unfiltered(
        self, local: torch.Tensor, rows: list[RowSampling], positions: list[int], filtered: set[int]
    ) -> list[int]:
        """Return the tokens; those of filtered rows mean nothing. Checks the logits of all rows."""
        # Per row: highest logit (NaN where there is one), highest score, and its id.
        best = torch.full((len(rows), 3), _NEVER, dtype=torch.float64)
        best[:, 2] = self._vocab_size
        if self._width:
            highest, where = local.max(dim=1)
            best[:, 0] = best[:, 1] = highest
            best[:, 2] = where + self._first
            for i, row in enumerate(rows):
                if i not in filtered and not row.is_plain(positions[i]):
                    scores = self._scores(local[i], row, positions[i])
                    index = int(scores.argmax())
                    best[i, 1], best[i, 2] = scores[index], index + self._first
        everywhere = self._comm.all_gather(best)  # [tp, rows, 3]
        highest = everywhere[:, :, 0].amax(dim=0)
        broken = highest.isfinite().logical_not_()
        if broken.any():
            raise NonFiniteLogitsError(broken.nonzero().flatten().tolist())
        if self._tp == 1:
            chosen = everywhere[0, :, 2]
        else:
            # The first of equals is the rank with the lowest ids.
            rank = everywhere[:, :, 1].argmax(dim=0, keepdim=True)
            chosen = everywhere[:, :, 2].gather(0, rank)[0]
        token_ids: list[int] = chosen.long().tolist()
        return token_ids

    def _scores(self, logits: torch.Tensor, row: RowSampling, position: int) -> torch.Tensor:
        """Return what the highest of is drawn, of one unfiltered row; may be ``logits`` itself."""
        adjusted = row.adjusted(logits, self._first, self._vocab_size, position)
        temperature = row.params.temperature
        if temperature == 0.0:
            return adjusted
        scores = adjusted.double().div_(temperature)
        return scores.add_(noise.gumbel(row.seed, position, self._hashed_ids))

    def _draw_filtered(
        self, local: torch.Tensor, rows: list[RowSampling], positions: list[int], some: list[int]
    ) -> list[int]:
        mine = torch.full((len(some), self._room), _NEVER)
        for place, i in enumerate(some):
            mine[place, : self._width] = rows[i].adjusted(
                local[i], self._first, self._vocab_size, positions[i]
            )
        parts = self._comm.all_gather(mine)  # [tp, rows, room]
        share = -(-len(some) // self._tp)
        drawn = torch.zeros(share, dtype=torch.int64)
        for place in range(self._tp_rank, len(some), self._tp):
            i = some[place]
            whole = parts[:, place].reshape(-1)[: self._vocab_size]
            drawn[place // self._tp] = draw_filtered(whole, rows[i].params, rows[i].seed, positions[i])
        token_ids: list[int] = self._comm.all_gather(drawn).t().reshape(-1)[: len(some)].tolist()
        return token_ids

    def _logprobs(
        self, local: torch.Tensor, token_ids: list[int], counts: list[int]
    ) -> list[TokenLogprobs]:
        """Return log-probabilities of one token per row of raw logits, and the ``counts[i]`` highest."""
        rows, most = len(token_ids), min(max(counts), self._vocab_size)
        # Per row: log-sum-exp, the token's logit, then the highest logits and their ids.
        mine = torch.full((rows, 2 + 2 * most), _NEVER, dtype=torch.float64)
        if self._width:
            mine[:, 0] = local.double().logsumexp(dim=1)
            here = torch.tensor(token_ids) - self._first
            is_here = (here >= 0) & (here < self._width)
            logit = local.gather(1, here.clamp(0, self._width - 1).unsqueeze(1))[:, 0]
            mine[:, 1] = logit.double().masked_fill_(is_here.logical_not(), _NEVER)
            count = min(most, self._width)
            if count:
                index = _highest(local, count)
                mine[:, 2 : 2 + count] = local.gather(1, index)
                mine[:, 2 + most : 2 + most + count] = index + self._first
        parts = self._comm.all_gather(mine)  # [tp, rows, 2 + 2 most]
        total = parts[:, :, 0].logsumexp(dim=0)
        broken = total.isfinite().logical_not_()
        if broken.any():
            raise NonFiniteLogitsError(broken.nonzero().flatten().tolist())
        chosen = parts[:, :, 1].amax(dim=0).sub_(total).tolist()
        tops = parts[:, :, 2:].permute(1, 2, 0)  # [rows, 2 most, tp]
        # By rank and then by place: ids ascend among equals, and the stable sort keeps that.
        values = tops[:, :most].transpose(1, 2).reshape(rows, -1)
        ids = tops[:, most:].transpose(1, 2).reshape(rows, -1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :most]
        top_ids = ids.gather(1, order).clamp_(min=0.0).long().tolist()
        top_values = values.gather(1, order).sub_(total.unsqueeze(1)).tolist()
        return [
            TokenLogprobs(token, chosen[i], top_ids[i][: counts[i]], top_values[i][: counts[i]])
            for i, token in enumerate(token_ids)
        ]


def _highest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 [rows, count], the indices of the highest, in order, lowest index first among equals."""
    # torch.topk promises nothing about ties, so the order is made one of distinct integers: a float32's
    # bits as a sign-magnitude number in the high half, the index, descending, in the low one.
    bits = (logits + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: equals have equal bits
    key = bits.bitwise_xor((bits >> 31) & 0x7FFFFFFF).long() << 32
    width = logits.shape[1]
    key |= torch.arange(width - 1, -1, -1)
    return (width - 1) - (key.topk(count, dim=1).values & 0xFFFFFFFF)
