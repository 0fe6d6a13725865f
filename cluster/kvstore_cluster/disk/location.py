"""Where a record lies, in one number."""

from typing import NewType

Location = NewType("Location", int)
"""Number of the segment and first block of the record in it; fits a signed 64-bit column."""

BLOCK_BITS = 24
MAX_SEGMENT_BLOCKS = 1 << BLOCK_BITS


def location_of(segment: int, block: int) -> Location:
    return Location(segment << BLOCK_BITS | block)


def segment_of(location: Location) -> int:
    return location >> BLOCK_BITS


def block_of(location: Location) -> int:
    return location & (MAX_SEGMENT_BLOCKS - 1)
