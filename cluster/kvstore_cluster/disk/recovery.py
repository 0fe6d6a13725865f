"""Opening a store: which records there are, which of them count, and what was lost.

The newest record of a chunk and encoding counts, unless a tombstone deletes it. Records of sealed segments are known
from the segments' indexes; any other segment is read, each chunk of it verified, what is left of it synced, and an
index written, so that it is read only once.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

from kvstore_cluster.disk.census import Census
from kvstore_cluster.disk.file import aligned_buffer, disk_error
from kvstore_cluster.disk.folder import StoreFolder
from kvstore_cluster.disk.location import Location, location_of
from kvstore_cluster.disk.log import SegmentLog
from kvstore_cluster.disk.record import BLOCK_BYTES, RecordMeta, blocks_of, decode
from kvstore_cluster.disk.scan import Found, scan
from kvstore_cluster.disk.segment import Segment
from kvstore_cluster.disk.segment_format import SegmentIndex, seed_of
from kvstore_cluster.disk.table import SegmentTable
from kvstore_codec.errors import DiskFailedError


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found. `records` can be iterated once, before the store is used for anything else; `dropped` says in a
    line each what was lost."""

    records: Iterator[tuple[RecordMeta, Location]]
    dropped: tuple[str, ...]


def recover(table: SegmentTable, segment_log: SegmentLog) -> Recovery:
    """Enters what the folder holds into the empty table and log. Raises DiskError when it cannot be read or written."""
    dropped: list[str] = []
    found: dict[int, Segment] = {}
    census = Census()
    with ExitStack() as files:
        try:
            for number in table.folder.numbers():
                opened = _open_segment(table.folder, number, files, dropped)
                if opened is None:
                    continue
                found[number], index = opened
                for block, header in index:
                    if census.add(location_of(number, block), header):
                        found[number].horizon = max(found[number].horizon, decode(header).horizon)
        except OSError as error:
            raise disk_error(error, f"recovering the disk tier in {table.folder.path}") from error
        files.pop_all()
    for number, first_blocks, blocks, states in census.books():
        found[number].adopt(first_blocks, blocks, states)
    for segment in found.values():
        table.add(segment)
    segment_log.continue_after(census.newest_sequence)
    segment_log.measure()
    return Recovery(_live_records(table.folder, list(found.values())), tuple(dropped))


def _open_segment(
    folder: StoreFolder, number: int, files: ExitStack, dropped: list[str]
) -> tuple[Segment, SegmentIndex] | None:
    """None when there is nothing in it that could be read."""
    path = folder.segment(number)
    size_bytes = path.stat().st_size
    if size_bytes < BLOCK_BYTES:  # it was begun, but no record was ever promised to be in it
        folder.remove(number)
        dropped.append(f"{path.name}: only begun, removed")
        return None
    if size_bytes % BLOCK_BYTES:  # direct I/O knows whole blocks only
        os.truncate(path, blocks_of(size_bytes) * BLOCK_BYTES)
    block = aligned_buffer(BLOCK_BYTES)
    with closing(folder.open_segment(number, create=False)) as file:
        file.read(0, [block])
    seed = seed_of(block, number)
    if seed is None:
        aside = folder.set_aside(number)
        dropped.append(f"{path.name}: its first block is damaged; all of it is now in {aside.name}")
        return None
    file = folder.open_segment(number, create=False)
    files.callback(file.close)
    segment = Segment(number, file, seed, blocks_of(size_bytes))
    segment.closed = segment.sealed = True
    segment.index = None
    index = SegmentIndex.read(folder.index(number), number, seed, size_bytes)
    if index is None:
        index = segment.index = _read_segment(segment, path.name, dropped)
        file.sync()
        segment.write_index(folder.index(number))
    segment.index_bytes = index.file_bytes
    return segment, index


def _read_segment(segment: Segment, name: str, dropped: list[str]) -> SegmentIndex:
    """The index of a segment that has none."""
    index = SegmentIndex(bytearray())
    for part in scan(segment.file, segment.seed, segment.end_block):
        if isinstance(part, Found):
            index.add(part.first_block, part.header)
        else:
            dropped.append(
                f"{name}: {part.blocks * BLOCK_BYTES} bytes at {part.first_block * BLOCK_BYTES}: {part.reason}"
            )
    return index


def _index_of(folder: StoreFolder, segment: Segment) -> SegmentIndex:
    if segment.index is not None:
        return segment.index
    path = folder.index(segment.number)
    index = SegmentIndex.read(path, segment.number, segment.seed, segment.file.size_bytes())
    if index is None:
        raise DiskFailedError(f"{path} was changed while it was read; check that disk, then start again")
    return index


def _live_records(folder: StoreFolder, found: list[Segment]) -> Iterator[tuple[RecordMeta, Location]]:
    try:
        for segment in found:
            for block, header in _index_of(folder, segment):
                if segment.blocks_at(block):
                    yield decode(header).meta, location_of(segment.number, block)
            segment.index = None
    except OSError as error:
        raise disk_error(error, f"recovering the disk tier in {folder.path}") from error
