"""Plans of disk reads: every range in one read, nothing read for nothing."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvstore_cluster.disk.record import BLOCK_BYTES
from kvstore_cluster.frame_plan import PlacedRange, block_reads

MOST = 16 * BLOCK_BYTES


def placed(*places: tuple[int, int]) -> list[PlacedRange]:
    return [PlacedRange(index, 0, 1, offset, length) for index, (offset, length) in enumerate(places)]


def test_ranges_whose_blocks_touch_are_read_together() -> None:
    ranges = placed((5000, 3000), (8192, 100), (20000, 100), (100, 200))
    reads = block_reads(ranges)
    assert [(read.offset, read.length) for read in reads] == [(0, 3 * BLOCK_BYTES), (16384, BLOCK_BYTES)]
    assert [{r.index for r in read.ranges} for read in reads] == [{3, 0, 1}, {2}]


def test_a_disk_of_small_sectors_reads_less() -> None:
    reads = block_reads(placed((5000, 3000), (8192, 100), (20000, 100)), block_bytes=512)
    assert [(read.offset, read.length) for read in reads] == [(4608, 4096), (19968, 512)]


def test_without_merging_every_range_is_read_alone() -> None:
    reads = block_reads(placed((5000, 3000), (8192, 100)), merge=False)
    assert [len(read.ranges) for read in reads] == [1, 1]


def test_the_read_with_the_first_range_of_the_request_comes_first() -> None:
    reads = block_reads(placed((900_000, 10), (100, 10), (500_000, 10)))
    assert [read.ranges[0].index for read in reads] == [0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 30_000)), max_size=30), st.booleans())
def test_every_range_is_in_one_read_of_whole_blocks(places: list[tuple[int, int]], merge: bool) -> None:
    reads = block_reads(placed(*places), merge=merge, most_bytes=MOST)
    assert sorted(r.index for read in reads for r in read.ranges) == list(range(len(places)))
    for read in reads:
        assert read.offset % BLOCK_BYTES == read.length % BLOCK_BYTES == 0
        assert len(read.ranges) == 1 or read.length <= MOST
        covered = read.offset
        for one in sorted(read.ranges, key=lambda r: r.offset):
            assert read.offset <= one.offset
            assert one.end <= read.offset + read.length
            # No block between two ranges is read for neither of them.
            assert one.offset - one.offset % BLOCK_BYTES <= covered
            covered = max(covered, one.end + -one.end % BLOCK_BYTES)
        assert covered == read.offset + read.length
    firsts = [min(r.index for r in read.ranges) for read in reads]
    assert all(a < b for a, b in pairwise(firsts))
