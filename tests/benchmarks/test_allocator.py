"""The rules of torch's caching allocator, one by one."""

import pytest
from stock_memory.allocator import MIB, CachingAllocator

from lowmem_rlhf.errors import RunError


def test_requests_are_rounded_and_share_a_small_segment():
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(513)
    assert (allocator.allocated, allocator.reserved) == (512 + 1024, 2 * MIB)
    allocator.allocate(MIB)
    assert allocator.reserved == 2 * MIB  # a small request is at most 1 MiB
    allocator.allocate(MIB)
    assert allocator.reserved == 4 * MIB


@pytest.mark.parametrize(
    ("size", "segment"), [(MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB)]
)
def test_large_segments(size, segment):
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert allocator.reserved == segment


def test_a_large_rest_of_at_most_one_mib_stays_with_the_block():
    allocator = CachingAllocator()
    for _ in range(3):
        allocator.allocate(5 * MIB)
    assert allocator.allocated == 15 * MIB
    allocator.allocate(4 * MIB)  # of the 5 that are left
    assert (allocator.allocated, allocator.reserved) == (20 * MIB, 20 * MIB)


def test_the_smallest_free_block_that_fits_is_taken_and_neighbours_join():
    allocator = CachingAllocator()
    large, small = allocator.allocate(64 * MIB), allocator.allocate(32 * MIB)
    allocator.release(large)
    allocator.release(small)
    first, second = allocator.allocate(16 * MIB), allocator.allocate(16 * MIB)
    assert allocator.reserved == 96 * MIB
    assert allocator.allocate(64 * MIB) is not None and allocator.reserved == 96 * MIB
    allocator.release(second)
    allocator.release(first)
    allocator.allocate(32 * MIB)  # only where the two were
    assert allocator.reserved == 96 * MIB


def test_of_equal_blocks_the_newest_segments_is_taken():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(32 * MIB) for _ in range(3)]
    for block in blocks:
        allocator.release(block)
    assert allocator.allocate(32 * MIB).address == blocks[2].address


def test_a_full_card_gets_free_segments_back_before_it_is_out_of_memory():
    allocator = CachingAllocator(capacity=100 * MIB)
    kept, gone = allocator.allocate(40 * MIB), allocator.allocate(50 * MIB)
    allocator.release(gone)
    allocator.allocate(60 * MIB)
    assert (allocator.reserved, allocator.peak_reserved) == (100 * MIB, 100 * MIB)
    allocator.release(kept)
    with pytest.raises(RunError, match="out of memory"):
        allocator.allocate(80 * MIB)


def test_peaks_begin_anew():
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(30 * MIB))
    assert (allocator.allocated, allocator.peak_allocated) == (0, 30 * MIB)
    allocator.reset_peaks()
    assert (allocator.peak_allocated, allocator.peak_reserved) == (0, 30 * MIB)
    allocator.empty_cache()
    assert allocator.reserved == 0
