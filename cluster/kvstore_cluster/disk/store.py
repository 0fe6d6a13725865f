"""The disk tier of a storage node: chunks in append-only segments that survive a crash."""

from collections.abc import Sequence
from pathlib import Path

from kvstore_cluster.disk.compaction import Compactor, Lost, Relocate
from kvstore_cluster.disk.file import FileEndsError, SegmentFile, disk_error
from kvstore_cluster.disk.folder import OpenFile, StoreFolder
from kvstore_cluster.disk.location import MAX_SEGMENT_BLOCKS, Location, block_of
from kvstore_cluster.disk.log import FEWEST_SEGMENTS, SegmentLog
from kvstore_cluster.disk.record import BLOCK_BYTES, RecordHeader, RecordMeta, decode, is_header
from kvstore_cluster.disk.recovery import Recovery, recover
from kvstore_cluster.disk.table import SegmentTable
from kvstore_cluster.disk.upkeep import Upkeep
from kvstore_codec.errors import (
    ChunkNotFoundError,
    ChunkTooLargeError,
    ConfigurationError,
    DiskFailedError,
    StorageError,
    TruncatedChunkError,
)

# A store has at most so many segments, each an open file.
_MOST_SEGMENTS = 512
# Above this share of live bytes compaction would copy more than it frees.
_LIVE_SHARE = 0.85


class SegmentStore:
    """Thread-safe. `folder` is made when missing and belongs to one process; `limit_bytes` is what all files in it may
    take (and a segment more for a moment, where only copying makes room). Call `recover` before anything else.

    A chunk is put by `append`, known by its location from then on, and gone after `delete`. Room comes back only by
    `compact`, so keep `live_bytes` under `capacity_bytes`. What was appended without `sync` is synced within
    `sync_period_s`.

    Raises ConfigurationError for a folder in use or a limit that is too low, DiskReadOnlyError and other DiskErrors
    for a folder that cannot be used. After a write or sync has failed, `append` raises that until the disk takes
    writes again, which is tried every `sync_period_s`; what can be read is read all the while.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        *,
        segment_bytes: int = 256 << 20,
        sync_period_s: float = 1.0,
        direct: bool = True,
        open_file: OpenFile = SegmentFile,
    ) -> None:
        segment_bytes = min(max(segment_bytes, limit_bytes // _MOST_SEGMENTS), limit_bytes // FEWEST_SEGMENTS)
        segment_bytes = min(segment_bytes // BLOCK_BYTES, MAX_SEGMENT_BLOCKS) * BLOCK_BYTES
        if segment_bytes < 4 * BLOCK_BYTES:
            raise ConfigurationError(
                f"{limit_bytes} bytes are too few for a disk tier; give it {4 * BLOCK_BYTES * FEWEST_SEGMENTS} or more"
            )
        self.limit_bytes = limit_bytes
        self._folder = StoreFolder(folder, direct=direct, open_file=open_file)
        self._table = SegmentTable(self._folder)
        self._upkeep = Upkeep(sync_period_s)
        self._log = SegmentLog(self._table, limit_bytes, segment_bytes, self._upkeep.wake)
        self._compactor = Compactor(self._table, self._log)
        self._recovered = False
        self._closed = False

    @property
    def direct(self) -> bool:
        """Whether the page cache is bypassed; else it is told to forget what was read and written."""
        return self._folder.direct

    @property
    def capacity_bytes(self) -> int:
        """Live bytes up to which there is always room after enough compaction: less than the limit allows while the
        disk itself is full."""
        return min(int(self._log.put_limit_bytes * _LIVE_SHARE), self._log.fitting_bytes)

    @property
    def live_bytes(self) -> int:
        """What the live records take on disk: chunks rounded up to whole blocks, and a block more for each."""
        return self._table.live_blocks * BLOCK_BYTES

    @property
    def used_bytes(self) -> int:
        """What all files take."""
        return self._table.used_blocks * BLOCK_BYTES

    @property
    def error(self) -> str:
        """Why nothing can be put, or what is there would not survive; empty when all is well."""
        if self._log.error is not None:
            return str(self._log.error)
        homeless_bytes = self._table.homeless_blocks * BLOCK_BYTES
        if homeless_bytes:
            return (
                f"files were removed from {self._folder.path}; {homeless_bytes} bytes of chunks in them are still "
                "to be written again"
            )
        return ""

    def recover(self) -> Recovery:
        """Opens what is there. Raises DiskError."""
        recovery = recover(self._table, self._log)
        # Not with the first append: whoever that comes from may have tied its thread to a processor.
        self._upkeep.start(self._log)
        self._recovered = True
        return recovery

    def append(self, meta: RecordMeta, views: Sequence[memoryview], *, sync: bool) -> Location:
        """Writes a chunk whose bytes are the views, back to back; with `sync` it returns once a power loss would not
        lose it.

        Raises DiskFullError, DiskReadOnlyError, DiskFailedError, ChunkTooLargeError, StorageError; then nothing is
        stored, although after a crash the chunk may be found.
        """
        self._require_open()
        if not 0 < meta.size_bytes == sum(view.nbytes for view in views):
            raise StorageError(
                f"chunk {meta.chunk_id.short} was announced with {meta.size_bytes} bytes, "
                f"but {sum(view.nbytes for view in views)} came"
            )
        most_bytes = self.limit_bytes - self._log.segment_bytes
        if meta.size_bytes > most_bytes - 4 * BLOCK_BYTES:
            raise ChunkTooLargeError(
                f"chunk {meta.chunk_id.short} has {meta.size_bytes} bytes, but {self._folder.path} may hold only "
                f"{most_bytes}; give the node more disk"
            )
        return self._log.append(meta, views, sync=sync)

    def read(self, location: Location, offset: int, views: Sequence[memoryview]) -> None:
        """Fills the views with the chunk's bytes from `offset`. Fastest, without a copy, into page-aligned memory from
        an offset that is a multiple of 4 KiB. What is read is not verified.

        Raises ChunkNotFoundError when the chunk was deleted or moved: ask the index again. TruncatedChunkError when
        its file was cut. DiskFailedError when the disk cannot read it, also when asked again.
        """
        self._require_open()
        size_bytes = sum(view.nbytes for view in views)
        end = offset + size_bytes
        with self._table.reading(location) as found:
            if found is None:
                raise ChunkNotFoundError(f"there is no chunk at {location} in {self._folder.path}")
            segment, blocks = found
            if not 0 <= offset <= end <= (blocks - 1) * BLOCK_BYTES:
                raise StorageError(f"bytes [{offset}, {end}) lie outside the chunk at {location}")
            try:
                segment.file.read((block_of(location) + 1) * BLOCK_BYTES + offset, views)
            except FileEndsError as error:
                raise TruncatedChunkError(
                    f"segment {segment.number} in {self._folder.path} is damaged: {error.strerror}"
                ) from error
            except OSError as error:
                raise disk_error(error, f"reading segment {segment.number} in {self._folder.path}") from error

    def delete(self, location: Location) -> None:
        """The chunk is dead; it may come back after a restart. Does nothing when it is dead already."""
        self._require_open()
        self._table.mark_dead(location)

    @property
    def newest_sequence(self) -> int:
        """The number of the newest append; those that begin later have higher ones."""
        return self._log.newest_sequence

    def forget(self, meta: RecordMeta, sequence: int) -> None:
        """No record of this id and encoding up to number `sequence` that was deleted comes back after a restart (after
        a power loss: unless that was less than `sync_period_s` ago). Take `newest_sequence` when the chunk is deleted:
        later appends are not touched, one that overlaps with that may be forgotten as well. Raises DiskError."""
        self._require_open()
        self._log.append_tombstone(meta, sequence)

    def sync(self) -> None:
        """Returns once everything that was appended would survive a power loss. Raises DiskError."""
        self._require_open()
        self._log.sync_all()

    def compact(self, relocate: Relocate, lost: Lost | None = None) -> bool:
        """Frees the space of dead chunks in one segment, if that is worth while; True when there may be more to do.

        Calls `relocate(meta, old, new)`, without a lock, for every live chunk that was moved: True when the index has
        the new location now, False when the old one is not in the index; that one stays valid until it is deleted.
        Calls `lost(meta, location)`, without a lock, for every live chunk that is damaged: its room comes back once
        it is deleted. Raises DiskError; then nothing was freed, and nothing is lost.
        """
        self._require_open()
        return self._compactor.step(relocate, lost, self._upkeep.stopping)

    def check_integrity(self) -> None:
        """Raises StorageError unless the books of all segments agree."""
        self._table.check_integrity()

    def close(self) -> None:
        """Syncs and seals everything, after a compaction under way has stopped; appends must have ended. Raises
        DiskError when what was appended could not be synced; the store is closed all the same."""
        if self._closed:
            return
        self._closed = True
        self._upkeep.stop()
        self._compactor.finish()
        try:
            self._log.close_active()
            self._log.seal_closed()
        finally:
            self._table.close()
            self._folder.close()

    def _header(self, location: Location) -> RecordHeader | None:
        """None when there is no live record; one that is damaged will not come back either."""
        with self._table.reading(location) as found:
            if found is None:
                return None
            segment, _ = found
            block = bytearray(BLOCK_BYTES)
            try:
                segment.file.read(block_of(location) * BLOCK_BYTES, [memoryview(block)])
            except OSError as error:
                raise disk_error(error, f"reading segment {segment.number} in {self._folder.path}") from error
            return decode(memoryview(block)) if is_header(memoryview(block), segment.seed) else None

    def _require_open(self) -> None:
        if self._closed or not self._recovered:
            raise DiskFailedError(
                f"the disk tier in {self._folder.path} is {'closed' if self._closed else 'not recovered yet'}"
            )
