"""The rows of this rank, kept between steps and changed by each plan's differences.

A plan that cannot be right is a ``ProtocolError`` that names the step and the slot, and nothing runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.control import Advance, NewRow, StepPlan
from protocol.errors import ProtocolError
from worker.context import BlockTable, RowSpan


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a plan may ask of this rank; from Boot and the model."""

    max_rows: int
    step_tokens: int
    context: int
    vocab_size: int
    num_groups: int
    num_blocks: int
    block_tokens: int


@dataclass(slots=True, eq=False)
class Row:
    """One slot's request. Changed only by ``Batch`` and, for its tokens, by the runner."""

    slot: int
    token_ids: list[int]
    """Those that are on this rank; a first stage waits for the last ones."""
    num_known: int
    """Tokens there are, those still on their way from the last stage among them."""
    num_prompt_tokens: int
    num_computed: int
    tables: tuple[BlockTable, ...]
    prompt_logprobs: int | None
    new_row: NewRow = field(repr=False)


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One row of one step."""

    row: Row
    span: RowSpan
    wants_logits: bool


class Batch:
    """Owner of all rows of a rank."""

    def __init__(self, limits: BatchLimits, on_new_row: Callable[[Row], None]) -> None:
        """``on_new_row`` is told of each row before it first runs."""
        self.limits = limits
        self._on_new_row = on_new_row
        self._rows: dict[int, Row] = {}
        self._last_step: int | None = None

    def __len__(self) -> int:
        """Rows that hold a slot."""
        return len(self._rows)

    def apply(self, plan: StepPlan) -> list[Scheduled]:
        """Release, add and advance rows as the plan says; return what runs, in law order."""
        if self._last_step is not None and plan.step != self._last_step + 1:
            raise ProtocolError(f"step {plan.step} came after step {self._last_step}: a plan was lost")
        self._last_step = plan.step
        try:
            for slot in plan.released_slots:
                if self._rows.pop(slot, None) is None:
                    raise ProtocolError(f"slot {slot} is released and holds no row")
            for new in plan.new_rows:
                self._add(new)
            return self._advance_all(plan.advances)
        except ProtocolError as error:
            raise ProtocolError(f"step {plan.step}: {error.message}") from None

    def _add(self, new: NewRow) -> None:
        limits, slot = self.limits, new.slot
        _check(0 <= slot < limits.max_rows, f"slot {slot} is not one of {limits.max_rows}")
        _check(slot not in self._rows, f"slot {slot} holds a row already")
        known = len(new.token_ids)
        _check(
            1 <= known <= limits.context,
            f"slot {slot} has {known} tokens, a row has 1 to {limits.context}",
        )
        _check(
            0 <= new.num_computed_tokens < known and 0 <= new.num_prompt_tokens <= known,
            f"slot {slot} has {new.num_computed_tokens} tokens computed and {new.num_prompt_tokens} of the "
            f"prompt, of {known} known",
        )
        _check(
            min(new.token_ids) >= 0 and max(new.token_ids) < limits.vocab_size,
            f"slot {slot} has a token outside the vocabulary of {limits.vocab_size}",
        )
        self._check_blocks(slot, new.block_ids)
        row = Row(
            slot,
            list(new.token_ids),
            known,
            new.num_prompt_tokens,
            new.num_computed_tokens,
            tuple(BlockTable(ids) for ids in new.block_ids),
            new.sampling.prompt_logprobs,
            new,
        )
        self._on_new_row(row)
        self._rows[slot] = row

    def _check_blocks(self, slot: int, block_ids: tuple[list[int], ...]) -> None:
        limits = self.limits
        _check(
            len(block_ids) == limits.num_groups,
            f"slot {slot} has block tables for {len(block_ids)} KV groups of {limits.num_groups}",
        )
        for ids in block_ids:
            _check(
                not ids or (min(ids) >= 0 and max(ids) < limits.num_blocks),
                f"slot {slot} has a block that is not one of {limits.num_blocks}",
            )

    def _advance_all(self, advances: list[Advance]) -> list[Scheduled]:
        tokens = sum(advance.num_tokens for advance in advances)
        _check(
            tokens <= self.limits.step_tokens,
            f"{tokens} tokens are over the limit of {self.limits.step_tokens}",
        )
        _check(
            len({advance.slot for advance in advances}) == len(advances), "a slot stands in the step twice"
        )
        scheduled: list[Scheduled] = []
        offset = 0
        for advance in advances:
            scheduled.append(self._advance(advance, offset))
            offset += advance.num_tokens
        self._check_writes(scheduled)
        return scheduled

    def _advance(self, advance: Advance, offset: int) -> Scheduled:
        slot, count = advance.slot, advance.num_tokens
        row = self._rows.get(slot)
        if row is None:
            raise ProtocolError(f"slot {slot} advances and holds no row")
        if advance.new_block_ids is not None:
            self._check_blocks(slot, advance.new_block_ids)
            for table, ids in zip(row.tables, advance.new_block_ids, strict=True):
                table.extend(ids)
        span = RowSpan(offset, row.num_computed, count, row.tables)
        _check(
            count >= 1 and span.end <= row.num_known,
            f"slot {slot} advances by {count} from {row.num_computed} of {row.num_known} known tokens",
        )
        _check(
            not advance.wants_logits or span.end == row.num_known,
            f"slot {slot} wants a token after position {span.end}, {row.num_known} are known",
        )
        room = min(len(table.ids) for table in row.tables) * self.limits.block_tokens
        _check(
            span.end <= min(room, self.limits.context),
            f"slot {slot} reaches position {span.end}, its blocks hold {room} tokens and the context "
            f"{self.limits.context}",
        )
        row.num_computed = span.end
        row.num_known += advance.wants_logits
        return Scheduled(row, span, advance.wants_logits)

    def _check_writes(self, scheduled: list[Scheduled]) -> None:
        # Shared prefixes are read by many; a block that two rows write is garbage for one of them.
        size = self.limits.block_tokens
        for group in range(self.limits.num_groups):
            written: set[int] = set()
            for item in scheduled:
                span = item.span
                ids = span.tables[group].ids[span.start // size : (span.end - 1) // size + 1]
                _check(
                    written.isdisjoint(ids) and len(set(ids)) == len(ids),
                    f"slot {item.row.slot} writes a block that is written twice in the step",
                )
                written.update(ids)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ProtocolError(message)
