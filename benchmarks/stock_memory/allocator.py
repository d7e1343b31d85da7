"""torch's caching allocator for CUDA, as far as it decides how much memory a process reserves: pure Python.

A tensor does not take its bytes from the card but a block from a segment that the allocator keeps. A process pays for
segments, so what it needs is decided by the order in which blocks are taken and given back. The rules and constants are
those of ``c10/cuda/CUDACachingAllocator.cpp`` with the default settings and one stream.
"""

from bisect import bisect_left, insort

from lowmem_rlhf.errors import RunError

KIB, MIB = 2**10, 2**20
ROUND = 512  # kMinBlockSize: every request is rounded up to a multiple
SMALL = MIB  # kSmallSize: the largest request of the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer: the segment of a request in the large pool below LARGE_ALONE
LARGE_ALONE = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own ...
ROUND_ALONE = 2 * MIB  # kRoundLarge: ... rounded up to a multiple


class Block:
    """A part of a segment; ``before`` and ``after`` are its neighbours in the same segment."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address, self.size, self.small = address, size, small
        self.free = True
        self.before: Block | None = None
        self.after: Block | None = None


class CachingAllocator:
    """Gives out blocks and counts.

    Attributes:
        allocated: bytes of the blocks that are in use; a block that was too little larger to be split counts whole.
        reserved: bytes of all segments.
        peak_allocated, peak_reserved: their highest values since the start or since `reset_peaks`.
        capacity: bytes that the process can reserve; None for no limit.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._next_address = 1 << 62
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # (size, address), sorted, by pool
        self._at: dict[int, Block] = {}  # free blocks by address

    def allocate(self, size: int) -> Block:
        """Take a block of at least ``size`` bytes: the smallest free one that fits, or one of a new segment.

        Raises:
            RunError: the card has no room for a new segment, even without the segments that are wholly free.
        """
        size = max(ROUND, -(-size // ROUND) * ROUND)
        small = size <= SMALL
        free = self._free[small]
        place = bisect_left(free, (size, -1))
        block = self._at.pop(free.pop(place)[1]) if place < len(free) else self._new_segment(size, small)
        rest = block.size - size
        if rest >= ROUND if small else rest > SMALL:  # should_split
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def release(self, block: Block) -> None:
        """Give a block back; it is joined with the free blocks beside it."""
        self.allocated -= block.size
        before, after = block.before, block.after
        if after is not None and after.free:
            self._take_out(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        if before is not None and before.free:
            self._take_out(before)
            before.size += block.size
            before.after = block.after
            if before.after is not None:
                before.after.before = before
            block = before
        self._put(block)

    def empty_cache(self) -> None:
        """Give wholly free segments back to the card, as ``torch.cuda.empty_cache`` does."""
        for block in [b for b in self._at.values() if b.before is None and b.after is None]:
            self._take_out(block)
            self.reserved -= block.size

    def reset_peaks(self) -> None:
        """Begin new peaks at what is allocated and reserved now."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _new_segment(self, size: int, small: bool) -> Block:
        if small:
            length = SMALL_SEGMENT
        elif size < LARGE_ALONE:
            length = LARGE_SEGMENT
        else:
            length = -(-size // ROUND_ALONE) * ROUND_ALONE
        if self.capacity is not None and self.reserved + length > self.capacity:
            self.empty_cache()
            if self.reserved + length > self.capacity:
                raise RunError(
                    f"out of memory: {self.reserved // MIB} of {self.capacity // MIB} MiB are reserved and "
                    f"{length // MIB} more are needed; take shorter sequences, fewer at once or a smaller model"
                )
        self.reserved += length
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        # The driver hands out addresses downwards, and of equal free blocks the lowest is taken: the newest segment's.
        self._next_address -= length
        block = Block(self._next_address, length, small)
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.small)
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        block.after, block.size = rest, size
        self._put(rest)

    def _put(self, block: Block) -> None:
        block.free = True
        self._at[block.address] = block
        insort(self._free[block.small], (block.size, block.address))

    def _take_out(self, block: Block) -> None:
        free = self._free[block.small]
        del free[bisect_left(free, (block.size, block.address))]
        del self._at[block.address]
