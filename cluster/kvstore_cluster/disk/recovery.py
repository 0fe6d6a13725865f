"""Recovery of a store: finds its records, decides which are live, and reports what was lost.

The newest record of a chunk and encoding is live (with `isolated`: of a tenant, chunk and encoding), unless a tombstone
deletes it. The records of a sealed segment are read from its index. A segment without an index is scanned: each chunk
is verified, the segment is synced, and its index is written, so that it is scanned only once.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

from kvstore_cluster.disk.census import Census
from kvstore_cluster.disk.file import aligned_buffer, disk_error
from kvstore_cluster.disk.folder import StoreFolder
from kvstore_cluster.disk.forgotten import ForgottenRecords
from kvstore_cluster.disk.layout import RecordLayout
from kvstore_cluster.disk.layouts import SegmentLayouts
from kvstore_cluster.disk.location import Location, location_of, segment_of
from kvstore_cluster.disk.log import SegmentLog
from kvstore_cluster.disk.record import BLOCK_BYTES, RecordMeta, blocks_of, decode, tenant_of
from kvstore_cluster.disk.scan import Found, scan
from kvstore_cluster.disk.segment import Segment
from kvstore_cluster.disk.segment_format import SegmentIndex
from kvstore_cluster.disk.table import SegmentTable
from kvstore_codec.errors import DiskFailedError


@dataclass(frozen=True, slots=True)
class Recovery:
    """Result of a recovery. `records` are the live records; iterate over them once, before any other use of the store.
    `dropped` has one line for each loss. `superseded` has the metadata and sequence number of records that must not be
    recovered any more, because they were not live before tenants were kept apart; they are dead."""

    records: Iterator[tuple[RecordMeta, Location]]
    dropped: tuple[str, ...]
    superseded: tuple[tuple[RecordMeta, int], ...] = ()


def recover(
    table: SegmentTable,
    segment_log: SegmentLog,
    layouts: SegmentLayouts,
    forgotten: ForgottenRecords,
    *,
    isolated: bool = False,
) -> Recovery:
    """Fills the empty table and log from the folder. Records that `forgotten` hides are dead. `isolated` is as in
    `SegmentStore.recover`. May block. Raises DiskError when it cannot be read or written, and EncryptionKeyError when a
    key is missing."""
    dropped: list[str] = []
    found: dict[int, Segment] = {}
    census = Census(isolated=isolated, was_shared=isolated and not table.folder.isolated)
    with ExitStack() as files:
        try:
            # Of all segments first: a missing key ends the recovery before it changes anything.
            known = {number: _layout_of(table.folder, layouts, number) for number in table.folder.numbers()}
            for number, layout in known.items():
                opened = _open_segment(table.folder, number, layout, files, dropped)
                if opened is None:
                    continue
                found[number], index = opened
                for block, header in index:
                    hidden = bool(forgotten) and forgotten.hides(*tenant_of(header))
                    if census.add(location_of(number, block), header, found[number].layout, hidden=hidden):
                        found[number].horizon = max(found[number].horizon, decode(header).horizon)
        except OSError as error:
            raise disk_error(error, f"recovering the disk tier in {table.folder.path}") from error
        files.pop_all()
    for number, first_blocks, blocks, states in census.books():
        found[number].adopt(first_blocks, blocks, states)
    for segment in found.values():
        table.add(segment)
    segment_log.continue_after(max(census.newest_sequence, forgotten.newest_sequence))
    segment_log.measure()
    superseded = _superseded(table, found, set(census.superseded()))
    return Recovery(_live_records(table.folder, list(found.values())), tuple(dropped), superseded)


def _open_segment(
    folder: StoreFolder, number: int, layout: RecordLayout | None, files: ExitStack, dropped: list[str]
) -> tuple[Segment, SegmentIndex] | None:
    """Opens a segment and its index. None when the segment is empty or its first block is damaged. Raises OSError."""
    path = folder.segment(number)
    size_bytes = path.stat().st_size
    if size_bytes < BLOCK_BYTES:  # no record in it was ever acknowledged
        folder.remove(number)
        dropped.append(f"{path.name}: only begun, removed")
        return None
    if size_bytes % BLOCK_BYTES:  # direct I/O needs whole blocks
        os.truncate(path, blocks_of(size_bytes) * BLOCK_BYTES)
    if layout is None:
        aside = folder.set_aside(number)
        dropped.append(f"{path.name}: its first block is damaged; all of it is now in {aside.name}")
        return None
    file = folder.open_segment(number, create=False)
    files.callback(file.close)
    segment = Segment(number, file, layout, blocks_of(size_bytes))
    segment.closed = segment.sealed = True
    segment.index = None
    index = SegmentIndex.read(folder.index(number), number, layout, size_bytes)
    if index is None or not index.fits(segment.end_block, layout):
        index = segment.index = _read_segment(segment, path.name, dropped)
        file.sync()
        segment.write_index(folder.index(number))
    segment.index_bytes = index.file_bytes + layout.index_overhead_bytes
    return segment, index


def _layout_of(folder: StoreFolder, layouts: SegmentLayouts, number: int) -> RecordLayout | None:
    """The layout of a segment. None when its first block is damaged or incomplete. Raises OSError, and
    EncryptionKeyError when its key is missing."""
    block = aligned_buffer(BLOCK_BYTES)
    with closing(folder.open_segment(number, create=False)) as file:
        if file.read_some(0, block) < BLOCK_BYTES:
            return None
    return layouts.existing(block, number, folder.segment(number))


def _read_segment(segment: Segment, name: str, dropped: list[str]) -> SegmentIndex:
    """Builds the index of a segment from its records."""
    index = SegmentIndex(bytearray())
    for part in scan(segment.file, segment.layout, segment.end_block):
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
    index = SegmentIndex.read(path, segment.number, segment.layout, segment.file.size_bytes())
    if index is None:
        raise DiskFailedError(f"{path} was changed while it was read; check that disk, then start again")
    return index


def _superseded(
    table: SegmentTable, found: dict[int, Segment], stale: set[Location]
) -> tuple[tuple[RecordMeta, int], ...]:
    """Marks the records at `stale` as dead. Returns the metadata and sequence number of each."""
    headers = []
    try:
        for number in {segment_of(location) for location in stale}:
            for block, header in _index_of(table.folder, found[number]):
                if (location := location_of(number, block)) in stale:
                    table.mark_dead(location)
                    headers.append(decode(header))
    except OSError as error:
        raise disk_error(error, f"recovering the disk tier in {table.folder.path}") from error
    return tuple((header.meta, header.sequence) for header in headers)


def _live_records(folder: StoreFolder, found: list[Segment]) -> Iterator[tuple[RecordMeta, Location]]:
    try:
        for segment in found:
            for block, header in _index_of(folder, segment):
                if segment.blocks_at(block):
                    yield decode(header).meta, location_of(segment.number, block)
            segment.index = None
    except OSError as error:
        raise disk_error(error, f"recovering the disk tier in {folder.path}") from error
