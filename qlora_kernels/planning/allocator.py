"""torch's caching allocator on a GPU, in a page: what it takes from the device for given tensors.

It rounds a request up to 512 bytes and looks for the smallest free block of its pool that holds it;
where there is none it takes a new segment from the device: 2 MiB for requests of up to 1 MiB, 20
MiB for those below 10 MiB, else the request rounded up to 2 MiB. What is left of a block is split
off and stays free; free neighbours in a segment join. A segment is given back by nothing that
happens here (torch gives free segments back when the device is full, and tries again).

The constants are those of c10/cuda/CUDACachingAllocator with its default settings; without
``expandable_segments``, which leave nearly nothing over.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Block", "CachingAllocator"]

MIB = 2**20
ROUNDING = 512
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
LARGE, LARGE_SEGMENT, LARGE_ROUNDING = 10 * MIB, 20 * MIB, 2 * MIB


class Block(NamedTuple):
    """A piece of a segment; ``begin`` is its offset there."""

    size: int
    segment: int
    begin: int


class CachingAllocator:
    """Hands out blocks; ``reserved`` bytes were taken from the device, ``allocated`` are in use."""

    def __init__(self) -> None:
        self.reserved = self.allocated = self.peak_reserved = 0
        self._segments = 0
        self._of_small: set[int] = set()  # segments
        self._free: dict[bool, list[Block]] = {True: [], False: []}  # by whether it is small

    def allocate(self, size: int) -> Block:
        """A block of at least ``size`` bytes."""
        size = max(ROUNDING, -(-size // ROUNDING) * ROUNDING)
        pool = self._free[size <= SMALL]
        fitting = [block for block in pool if block.size >= size]
        if fitting:
            block = min(fitting)
            pool.remove(block)
        else:
            block = Block(self._segment(size), self._segments, 0)
            if size <= SMALL:
                self._of_small.add(self._segments)
            self._segments += 1
            self.reserved += block.size
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        rest = block.size - size
        if rest >= ROUNDING if size <= SMALL else rest > SMALL:
            pool.append(Block(rest, block.segment, block.begin + size))
            block = Block(size, block.segment, block.begin)
        self.allocated += block.size
        return block

    @staticmethod
    def _segment(size: int) -> int:
        if size <= SMALL:
            return SMALL_SEGMENT
        if size < LARGE:
            return LARGE_SEGMENT
        return -(-size // LARGE_ROUNDING) * LARGE_ROUNDING

    def free(self, block: Block) -> None:
        """Takes a block back."""
        self.allocated -= block.size
        pool = self._free[block.segment in self._of_small]
        size, segment, begin = block
        for other in [b for b in pool if b.segment == segment]:
            if other.begin + other.size == begin:
                begin = other.begin
            elif other.begin != begin + size:
                continue
            pool.remove(other)
            size += other.size
        pool.append(Block(size, segment, begin))
