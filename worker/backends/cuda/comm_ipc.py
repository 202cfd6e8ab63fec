"""The IPC way: our kernels over memory that the ranks have mapped of each other. See ``collectives.cu``.

Works between processes on one GPU or on several. No call waits on the host, allocates device memory past
torch's allocator, or carries a number that a captured graph could not replay.
"""

from collections.abc import Iterator, Sequence

import torch

from worker.backends.cuda.comm_memory import MOST_BLOCKS, WORDS_BYTES, GroupLayout, LaneLayout, Regions
from worker.backends.cuda.comm_page import DeviceOperation, Page
from worker.backends.cuda.launch import Kernel, Kernels
from worker.comm_group import sum_in_rank_order

_FILE = "collectives"
_GROUP = "PPPPPPPP" + "PQ" + "qqqqqqqq"  # struct Group
_DEAL = _GROUP + "q" * 32  # struct Deal
_LANE = "PPPQ" + "qqqqqqqqq"  # struct Lane
_SUMS = {
    "all_reduce_one_shot": "Pq",
    "all_reduce_two_shot": "Pq",
    "reduce_scatter": "PPqq",
    "merge_parts": "PPPqii",
}
_PACK_BYTES = 16
_WORDS_BLOCK = 256
_BLOCK = 512
_NORM_CHUNKS = (1, 2, 4)  # of a row, for a thread
_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}


def one_shot_limit(ranks: int) -> int:
    """Return the bytes up to which every rank sends all it has to all: then it sends that to each."""
    return min(WORDS_BYTES, (512 << 10) // ranks)


class IpcGroup:
    """The collectives of one rank in a group of 2 to 8 neighbours."""

    def __init__(
        self,
        kernels: Kernels,
        ranks: range,
        rank: int,
        regions: Regions,
        layout: GroupLayout,
        page: Page,
        timeout_s: float,
    ) -> None:
        self._page, self._ranks = page, ranks
        self._size, self._index = len(ranks), rank - ranks[0]
        self._layout = layout
        self._limit = one_shot_limit(self._size) if layout.words_slot else 0
        self._kernels = _load(kernels, next(width for width in (2, 4, 8) if self._size <= width))
        addresses = [regions[peer] + layout.base for peer in ranks] + [0] * (8 - self._size)
        places = (layout.words, layout.words_slot, layout.plain, layout.plain_slot)
        head = (
            *addresses,
            page.device_address,
            int(timeout_s * 1e9),
            self._index,
            self._size,
            self._ranks[0],
        )
        self._structs = {operation: (*head, int(operation), *places) for operation in DeviceOperation}

    def all_reduce(self, x: torch.Tensor) -> None:
        """See ``Communicator.all_reduce``."""
        if x.numel() == 0:
            return
        if x.dtype not in _NAMES:
            sum_in_rank_order(self.all_gather(x), x)
        elif not x.is_contiguous():
            whole = x.contiguous()
            self.all_reduce(whole)
            x.copy_(whole)
        elif x.nbytes <= self._limit:
            self.all_reduce_one_shot(x)
        else:
            self.all_reduce_two_shot(x)

    def all_reduce_one_shot(self, x: torch.Tensor) -> None:
        """Sum contiguous bf16 or float32: every rank sends everything and adds everything."""
        kernel = self._kernels[f"all_reduce_one_shot_{_NAMES[x.dtype]}"]
        struct = self._structs[DeviceOperation.ALL_REDUCE]
        for address, count in _pieces(x, WORDS_BYTES):
            grid = _blocks(count * x.itemsize, _WORDS_BLOCK)
            kernel((grid,), _WORDS_BLOCK, (address, count, *struct))

    def all_reduce_two_shot(self, x: torch.Tensor) -> None:
        """Sum contiguous bf16 or float32: every rank adds its share and hands it out."""
        kernel = self._kernels[f"all_reduce_two_shot_{_NAMES[x.dtype]}"]
        struct = self._structs[DeviceOperation.ALL_REDUCE]
        for address, count in _pieces(x, self._layout.plain_slot * self._size):
            grid = _blocks(-(-count * x.itemsize // self._size), _BLOCK)
            kernel((grid,), _BLOCK, (address, count, *struct))

    def fuses(self, x: torch.Tensor) -> bool:
        """Whether ``all_reduce_norm`` takes ``x`` [tokens, hidden]; it would be slow for long ones."""
        if x.dtype not in _NAMES or not x.is_contiguous() or x.numel() == 0:
            return False
        packs, rest = divmod(x.shape[-1] * x.itemsize, _PACK_BYTES)
        return not rest and packs <= _BLOCK * _NORM_CHUNKS[-1] and x.nbytes <= self._limit

    def all_reduce_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add the group's sum of ``x`` to ``residual``, in place, and return the residual's RMSNorm.

        All contiguous, [tokens, hidden] and [hidden], of one dtype that ``fuses``. ``x`` is kept. Rounds
        where ``all_reduce``, an addition and a norm would.
        """
        assert residual.is_contiguous()
        assert residual.dtype == weight.dtype == x.dtype
        width = x.shape[-1]
        rows = x.numel() // width
        packs = width * x.itemsize // _PACK_BYTES
        chunks = next(chunks for chunks in _NORM_CHUNKS if packs <= _BLOCK * chunks)
        kernel = self._kernels[f"all_reduce_norm_{chunks}_{_NAMES[x.dtype]}"]
        out = torch.empty_like(x)
        block = -(-packs // (32 * chunks)) * 32
        struct = self._structs[DeviceOperation.ALL_REDUCE_NORM]
        kernel((min(rows, MOST_BLOCKS),), block, (x, residual, weight, out, rows, width, eps, *struct))
        return out

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Communicator.all_gather``."""
        x = x.contiguous()
        out = torch.empty((self._size, *x.shape), dtype=x.dtype, device=x.device)
        if x.numel() == 0:
            return out
        name, unit = _unit(x, out)
        kernel = self._kernels[f"all_gather_{name}"]
        struct = self._structs[DeviceOperation.ALL_GATHER]
        for start, num_bytes in _byte_pieces(x.nbytes, self._layout.plain_slot):
            arguments = (x.data_ptr() + start, out.data_ptr() + start, x.nbytes // unit, num_bytes // unit)
            kernel((_blocks(num_bytes, _BLOCK),), _BLOCK, (*arguments, *struct))
        return out

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of x [rows, …] of all ranks, [rows, ranks, …]."""
        x = x.contiguous()
        rows, row_bytes = x.shape[0], x.nbytes // max(x.shape[0], 1)
        if row_bytes % _PACK_BYTES:
            return self.all_gather(x).transpose(0, 1).contiguous()
        out = torch.empty((rows, self._size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        kernel, struct = self._kernels["gather_rows"], self._structs[DeviceOperation.ALL_GATHER]
        most = self._layout.plain_slot // max(row_bytes, 1)
        assert most, f"rows of {row_bytes} bytes are longer than a slot of {self._layout.plain_slot}"
        for first in range(0, rows, most):
            count = min(most, rows - first)
            address = x.data_ptr() + first * row_bytes
            to = out.data_ptr() + first * row_bytes * self._size
            arguments = (address, to, count, row_bytes // _PACK_BYTES, *struct)
            kernel((_blocks(count * row_bytes, _BLOCK),), _BLOCK, arguments)
        return out

    def merge_parts(self, found: torch.Tensor, log_sums: torch.Tensor) -> torch.Tensor:
        """Return attention of this rank's heads over the parts of contexts that the ranks keep.

        ``found`` [tokens, ranks * heads, dim], bf16 or float32: what the parts that are here give to the
        heads of all ranks; ``log_sums``, float32 [tokens, ranks * heads]: the base-2 logarithms of their
        softmaxes' denominators, -inf for an empty part. Returns [tokens, heads, dim], added in rank order;
        zeros where all parts are empty. ``dim`` is whole runs of 16 bytes.
        """
        tokens, everybody, dim = found.shape
        heads = everybody // self._size
        assert found.is_contiguous(), found.stride()
        assert log_sums.is_contiguous(), log_sums.stride()
        assert log_sums.dtype == torch.float32, log_sums.dtype
        assert log_sums.shape == found.shape[:2], (log_sums.shape, found.shape)
        assert dim * found.itemsize % _PACK_BYTES == 0, (dim, found.dtype)
        out = torch.empty((tokens, heads, dim), dtype=found.dtype, device=found.device)
        kernel = self._kernels[f"merge_parts_{_NAMES[found.dtype]}"]
        struct = self._structs[DeviceOperation.MERGE_PARTS]
        given_bytes, own_bytes = everybody * dim * found.itemsize, heads * dim * found.itemsize
        # In a slot a token's log-sums stand behind its means, in whole packs.
        most = self._layout.plain_slot // (own_bytes + -(-heads // 4) * _PACK_BYTES)
        assert most, f"{heads} heads of {dim} elements are longer than a slot of {self._layout.plain_slot}"
        for first in range(0, tokens, most):
            count = min(most, tokens - first)
            arguments = (
                found.data_ptr() + first * given_bytes,
                log_sums.data_ptr() + first * everybody * log_sums.itemsize,
                out.data_ptr() + first * own_bytes,
                *(count, heads, dim, *struct),
            )
            kernel((min(count, MOST_BLOCKS),), _BLOCK, arguments)
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Communicator.reduce_scatter``."""
        if x.shape[0] % self._size:
            raise ValueError(f"{x.shape[0]} rows cannot be dealt evenly to {self._size} ranks")
        x = x.contiguous()
        out = torch.empty((x.shape[0] // self._size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        if x.numel() == 0:
            return out
        if x.dtype not in _NAMES:
            parts = self.all_gather(x).view(self._size, self._size, -1)
            sum_in_rank_order(parts[:, self._index], out.view(-1))
            return out
        kernel = self._kernels[f"reduce_scatter_{_NAMES[x.dtype]}"]
        struct = self._structs[DeviceOperation.REDUCE_SCATTER]
        for start, num_bytes in _byte_pieces(out.nbytes, self._layout.plain_slot):
            arguments = (x.data_ptr() + start, out.data_ptr() + start, out.numel(), num_bytes // x.itemsize)
            kernel((_blocks(num_bytes, _BLOCK),), _BLOCK, (*arguments, *struct))
        return out

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """See ``Communicator.all_to_all``. The hosts tell each other their counts, so no graph holds it."""
        if len(counts) != self._size or sum(counts) != x.shape[0] or min(counts) < 0:
            raise ValueError(f"counts {list(counts)} do not deal {x.shape[0]} rows to {self._size} ranks")
        x = x.contiguous()
        table = self._page.deal(self._ranks, counts)  # [sender][taker]
        taken = [row[self._index] for row in table]
        out = torch.empty((sum(taken), *x.shape[1:]), dtype=x.dtype, device=x.device)
        row_bytes = x.itemsize
        for size in x.shape[1:]:
            row_bytes *= size
        name, unit = _unit(x, out, row_bytes)
        kernel = self._kernels[f"all_to_all_{name}"]
        struct = self._structs[DeviceOperation.ALL_TO_ALL]
        largest = max(map(max, table)) * row_bytes
        for start, num_bytes in _byte_pieces(largest, self._layout.plain_slot):
            deal = (
                *_cut(counts, row_bytes, start, num_bytes, unit),
                *_cut(taken, row_bytes, start, num_bytes, unit),
            )
            kernel((_blocks(num_bytes, _BLOCK),), _BLOCK, (x, out, *struct, *deal))
        return out


class IpcLane:
    """One end of messages that go one way between two ranks, in order."""

    def __init__(
        self,
        kernels: Kernels,
        operation: DeviceOperation,
        rank: int,
        peer: int,
        regions: Regions,
        layout: LaneLayout,
        page: Page,
        timeout_s: float,
    ) -> None:
        """``operation`` says which end this is: the giving or the taking."""
        gives = operation in (DeviceOperation.TO_NEXT_STAGE, DeviceOperation.TOKENS_TO_FIRST_STAGE)
        verb = "give" if gives else "take"
        self._kernels = {unit: kernels.get(_FILE, f"{verb}_{unit}", "Pq" + _LANE) for unit in ("u32", "u8")}
        self._slot_bytes = layout.slot_bytes
        addresses = (regions[rank], regions[peer], page.device_address, int(timeout_s * 1e9))
        places = (layout.taken, layout.flags, layout.slots, layout.slot_bytes, layout.depth)
        head = layout.give_head if gives else layout.take_head
        self._struct = (*addresses, rank, peer, int(operation), head, *places)

    def move(self, x: torch.Tensor) -> None:
        """Give contiguous ``x``, or fill it with what comes."""
        name, unit = _unit(x)
        for start, num_bytes in _byte_pieces(x.nbytes, self._slot_bytes):
            arguments = (x.data_ptr() + start, num_bytes // unit, *self._struct)
            self._kernels[name]((_blocks(num_bytes, _BLOCK),), _BLOCK, arguments)


def _load(kernels: Kernels, width: int) -> dict[str, Kernel]:
    # All at once: a module must not be loaded while a graph is captured.
    found = {"gather_rows": kernels.get(_FILE, "gather_rows", "PPqi" + _GROUP)}
    for name in _NAMES.values():
        for stem, signature in _SUMS.items():
            found[f"{stem}_{name}"] = kernels.get(_FILE, f"{stem}_{name}_{width}", signature + _GROUP)
        for chunks in _NORM_CHUNKS:
            full = f"all_reduce_norm_{name}_{chunks}_{width}"
            found[f"all_reduce_norm_{chunks}_{name}"] = kernels.get(_FILE, full, "PPPPqif" + _GROUP)
    for unit in ("u32", "u8"):
        found[f"all_gather_{unit}"] = kernels.get(_FILE, f"all_gather_{unit}", "PPqq" + _GROUP)
        found[f"all_to_all_{unit}"] = kernels.get(_FILE, f"all_to_all_{unit}", "PP" + _DEAL)
    return found


def _blocks(num_bytes: int, block: int) -> int:
    # The same on all ranks: a block meets the block of its number.
    return max(min(-(-num_bytes // (_PACK_BYTES * block)), MOST_BLOCKS), 1)


def _byte_pieces(num_bytes: int, limit: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_bytes, limit):
        yield start, min(limit, num_bytes - start)


def _pieces(x: torch.Tensor, limit: int) -> Iterator[tuple[int, int]]:
    for start, num_bytes in _byte_pieces(x.nbytes, limit // _PACK_BYTES * _PACK_BYTES):
        yield x.data_ptr() + start, num_bytes // x.itemsize


def _unit(x: torch.Tensor, out: torch.Tensor | None = None, row_bytes: int = 4) -> tuple[str, int]:
    # Only how this rank reads and writes its tensors: what travels is the same bytes.
    addresses = x.data_ptr() | (0 if out is None else out.data_ptr())
    return ("u8", 1) if (addresses | x.nbytes | row_bytes) % 4 else ("u32", 4)


def _cut(counts: Sequence[int], row_bytes: int, start: int, limit: int, unit: int) -> list[int]:
    """Return, in units, where each rank's rows of a piece begin and how many there are, eight of each."""
    at, sizes, first = [0] * 8, [0] * 8, 0
    for index, count in enumerate(counts):
        num_bytes = count * row_bytes
        at[index] = (first + start) // unit
        sizes[index] = max(min(num_bytes - start, limit), 0) // unit
        first += num_bytes
    return at + sizes
