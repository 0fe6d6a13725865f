"""The location of a record in the store, as one integer."""

from typing import NewType

Location = NewType("Location", int)
"""Segment number and first block of a record, packed to fit a signed 64-bit column."""

BLOCK_BITS = 24
MAX_SEGMENT_BLOCKS = 1 << BLOCK_BITS


def location_of(segment: int, block: int) -> Location:
    return Location(segment << BLOCK_BITS | block)


def segment_of(location: Location) -> int:
    return location >> BLOCK_BITS


def block_of(location: Location) -> int:
    return location & (MAX_SEGMENT_BLOCKS - 1)
