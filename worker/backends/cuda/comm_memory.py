"""The device memory in which ranks meet: its layout, and mapping each other's."""

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from cuda.bindings import driver
from torch.distributed import Store  # type: ignore[attr-defined]

from protocol.topology import Topology
from worker.backends.cuda.driver import CudaError, check
from worker.comm_group import CollectiveError

MOST_GROUP = 8
"""Ranks of a tensor-parallel group, at most."""

MOST_BLOCKS = 64
"""Of a kernel that waits for peers: all of them must run at once, beside what else runs."""

WORDS_BYTES = 256 << 10
"""Data of the largest message that travels as words beside their tags."""

PLAIN_BYTES = 4 << 20
"""Of the largest sum that one launch makes in two shots."""

HIDDEN_BYTES = 4 << 20
"""Of the hidden states that one launch hands to the next stage."""

_HIDDEN_DEPTH = 2
_TOKEN_BYTES = 16 << 10
_FLAGS_AT = 4096  # as in collectives.cu
_GROUP_FLAGS_BYTES = 2 * 2 * MOST_GROUP * MOST_BLOCKS * 8
_UNIT = 2 << 20  # the driver's own: a region shares its allocation, which peers map whole, with nothing


@dataclass(frozen=True)
class LaneLayout:
    """Of messages one way between two ranks; offsets in bytes into the regions of both."""

    give_head: int
    take_head: int
    taken: int
    flags: int
    slots: int
    slot_bytes: int
    depth: int


@dataclass(frozen=True)
class GroupLayout:
    """Of a group's collectives; in bytes. Head and flags stand at the beginning of what is the group's."""

    base: int
    """Where that is, in a rank's region; the others count from there."""
    words: int
    words_slot: int
    """0: no sum goes as words."""
    plain: int
    plain_slot: int


@dataclass(frozen=True)
class RegionLayout:
    """Where things stand in a rank's region, the same on every rank; in bytes."""

    group: GroupLayout
    positions: GroupLayout
    """Of the dcp group; where it is the tp group, that one's."""
    hidden: LaneLayout
    tokens: LaneLayout
    num_bytes: int


def lay_out(topology: Topology) -> RegionLayout:
    """Return the layout for a topology; what a degree of 1 never uses takes nothing."""
    has_group, has_stages = topology.tp > 1, topology.pp > 1
    # As many tokens as steps can be in flight: the last stage never waits for the first.
    token_depth = topology.pp + 2
    flags = _FLAGS_AT + _GROUP_FLAGS_BYTES
    token_flags = flags + _HIDDEN_DEPTH * MOST_BLOCKS * 8
    end = _round_up(token_flags + token_depth * MOST_BLOCKS * 8, 4096)

    words, words_slot = end, 2 * WORDS_BYTES
    end += 2 * topology.tp * words_slot * has_group
    plain, plain_slot = end, PLAIN_BYTES // topology.tp // 16 * 16
    end += 2 * 2 * topology.tp * plain_slot * has_group
    group = positions = GroupLayout(0, words, words_slot, plain, plain_slot)
    if 1 < topology.dcp < topology.tp:
        first, plain_slot = _FLAGS_AT + _GROUP_FLAGS_BYTES, PLAIN_BYTES // topology.dcp // 16 * 16
        positions = GroupLayout(end, first, 0, first, plain_slot)
        end = _round_up(end + first + 2 * 2 * topology.dcp * plain_slot, 4096)
    hidden_slots = end
    end += _HIDDEN_DEPTH * HIDDEN_BYTES * has_stages
    token_slots = end
    end += token_depth * _TOKEN_BYTES * has_stages
    # Heads and counters that different ranks write have 64 bytes each; the group's head is at 0.
    hidden = LaneLayout(64, 128, 192, flags, hidden_slots, HIDDEN_BYTES, _HIDDEN_DEPTH)
    tokens = LaneLayout(256, 320, 384, token_flags, token_slots, _TOKEN_BYTES, token_depth)
    return RegionLayout(group, positions, hidden, tokens, _round_up(end, _UNIT))


class Regions:
    """A rank's own region, zeroed, and its mappings of others'. Needs a current context.

    The memory is cuMemAlloc's, because only that has handles that other processes can open.
    """

    def __init__(self, rank: int, num_bytes: int) -> None:
        """Errors: ``CudaError``."""
        self._rank = rank
        self.num_bytes = num_bytes
        own = check(driver.cuMemAlloc(num_bytes), f"{num_bytes} bytes of communicator buffers")
        self._at = {rank: int(own)}
        check(driver.cuMemsetD8(own, 0, num_bytes), "clearing the communicator buffers")
        check(driver.cuCtxSynchronize(), "clearing the communicator buffers")

    def __getitem__(self, rank: int) -> int:
        """Return the address of a rank's region in this process."""
        return self._at[rank]

    def exchange(self, store: Store, peers: Sequence[int]) -> None:
        """Publish the handle of the own region and map those of ``peers``.

        Errors: ``CudaError``; ``CollectiveError`` where a peer does not come in the store's time.
        """
        handle = check(driver.cuIpcGetMemHandle(driver.CUdeviceptr(self._at[self._rank])), "own IPC handle")
        store.set(f"ipc/{self._rank}", ctypes.string_at(handle.getPtr(), _HANDLE_BYTES).hex())
        flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        for peer in peers:
            try:
                told = bytes.fromhex(store.get(f"ipc/{peer}").decode())
            except RuntimeError as error:
                raise CollectiveError(
                    self._rank, "connect", [peer], str(error).partition("\n")[0]
                ) from None
            if len(told) != _HANDLE_BYTES:
                raise CollectiveError(self._rank, "connect", [peer], f"a handle of {len(told)} bytes")
            theirs = driver.CUipcMemHandle()
            ctypes.memmove(theirs.getPtr(), told, _HANDLE_BYTES)
            opened = check(
                driver.cuIpcOpenMemHandle(theirs, int(flag)), f"mapping the buffers of rank {peer}"
            )
            self._at[peer] = int(opened)

    def close_peers(self) -> None:
        """Unmap what is not this rank's own. No kernel may run that uses it."""
        for peer in [rank for rank in self._at if rank != self._rank]:
            # A mapping whose owner has died may refuse; it goes with this process.
            with contextlib.suppress(CudaError):
                check(
                    driver.cuIpcCloseMemHandle(driver.CUdeviceptr(self._at.pop(peer))), "unmapping a peer"
                )

    def close(self) -> None:
        """Free the own region, after every peer has unmapped it or is gone."""
        check(
            driver.cuMemFree(driver.CUdeviceptr(self._at.pop(self._rank))), "freeing communicator buffers"
        )


_HANDLE_BYTES = 64


def _round_up(number: int, unit: int) -> int:
    return (number + unit - 1) // unit * unit
