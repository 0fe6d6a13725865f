"""The segment store: chunks on disk, in append-only segments that survive a crash."""

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from kvstore_cluster.disk.compaction import FULL_PAUSE_S, Compactor, Lost, Relocate
from kvstore_cluster.disk.file import FileEndsError, SegmentFile, disk_error
from kvstore_cluster.disk.folder import OpenFile, StoreFolder
from kvstore_cluster.disk.forgotten import ForgottenRecords, read_forgotten, write_forgotten
from kvstore_cluster.disk.layouts import SegmentLayouts
from kvstore_cluster.disk.location import MAX_SEGMENT_BLOCKS, Location, block_of
from kvstore_cluster.disk.log import FEWEST_SEGMENTS, SegmentLog
from kvstore_cluster.disk.record import BLOCK_BYTES, Kind, RecordMeta, record_blocks
from kvstore_cluster.disk.recovery import Recovery, recover
from kvstore_cluster.disk.table import SegmentTable
from kvstore_cluster.disk.upkeep import Upkeep
from kvstore_cluster.encryption import FileCipher, KeySource
from kvstore_codec.errors import (
    ChunkNotFoundError,
    ChunkTooLargeError,
    ConfigurationError,
    DiskError,
    DiskFailedError,
    DiskFullError,
    StorageError,
    TruncatedChunkError,
)

log = logging.getLogger(__name__)

# Limit of the segments of a store. Each is an open file.
_MOST_SEGMENTS = 512
# Above this share of live bytes, compaction would copy more than it frees.
_LIVE_SHARE = 0.85


class SegmentStore:
    """Stores chunks in a folder. Thread-safe; all methods may block on the disk.

    `folder` is created when missing, and locked for one process. `limit_bytes` limits the total size of its files;
    compaction may briefly exceed the limit by one segment. Call `recover` before any other method.

    `append` stores a chunk and returns its location, and `delete` removes it. Only `compact` frees disk space, so keep
    `live_bytes` under `capacity_bytes`. Records appended without `sync` are synced within `sync_period_s`.

    With `keys`, what is written is encrypted with the first of them. Segments of other keys, and plain ones, are read,
    and `compact` writes them again. Without `keys`, `recover` refuses a folder with encrypted files.

    Raises ConfigurationError for a folder in use or a limit that is too low, and DiskReadOnlyError or another DiskError
    for a folder that cannot be used. After a failed write or sync, `append` raises that error until the disk accepts
    writes again, which is tested every `sync_period_s`. Reads continue to work.
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
        keys: KeySource | None = None,
    ) -> None:
        segment_bytes = min(max(segment_bytes, limit_bytes // _MOST_SEGMENTS), limit_bytes // FEWEST_SEGMENTS)
        segment_bytes = min(segment_bytes // BLOCK_BYTES, MAX_SEGMENT_BLOCKS) * BLOCK_BYTES
        if segment_bytes < 4 * BLOCK_BYTES:
            raise ConfigurationError(
                f"{limit_bytes} bytes are too few for a disk tier; give it {4 * BLOCK_BYTES * FEWEST_SEGMENTS} or more"
            )
        self.limit_bytes = limit_bytes
        self._folder = StoreFolder(folder, direct=direct, open_file=open_file)
        self._layouts, self._files = SegmentLayouts(keys), FileCipher(keys)
        self._table = SegmentTable(self._folder)
        self._upkeep = Upkeep(sync_period_s)
        self._log = SegmentLog(self._table, self._layouts, limit_bytes, segment_bytes, self._upkeep.wake)
        self._compactor = Compactor(self._table, self._log, self._layouts)
        self.forgotten = ForgottenRecords()
        """Which records are dead because their tenant was forgotten, as the folder says."""
        self._forgotten_key: str | None = None
        self._update_forgotten_at_s = 0.0  # monotonic time
        self._forgetting = threading.Lock()  # held to write the file of forgotten records
        self._recovered = False
        self._closed = False

    @property
    def direct(self) -> bool:
        """Whether I/O bypasses the page cache. Otherwise the store tells the page cache to drop what it read or
        wrote."""
        return self._folder.direct

    @property
    def read_unit_bytes(self) -> int:
        """Offsets and lengths of reads are best multiples of this: what the disk reads at least."""
        return max(self._folder.read_unit_bytes, self._layouts.read_unit_bytes)

    @property
    def capacity_bytes(self) -> int:
        """Live bytes for which compaction can always make room. Less than the limit allows while the disk is full."""
        return min(int(self._log.put_limit_bytes * _LIVE_SHARE), self._log.fitting_bytes)

    @property
    def live_bytes(self) -> int:
        """Bytes of live records on disk: each chunk rounded up to whole blocks, and one block for its header."""
        return self._table.live_blocks * BLOCK_BYTES

    def record_bytes(self, size_bytes: int) -> int:
        """Bytes that a new chunk of `size_bytes` takes on disk, including its header."""
        return record_blocks(Kind.PUT, size_bytes, self._layouts.data_blocks) * BLOCK_BYTES

    @property
    def chunks_by_key(self) -> dict[str, int]:
        """Number of live chunks by the id of the key that encrypts them, in hexadecimal digits. The id of plain ones is
        empty. A key without chunks is named while a file of it is left. Empty for a store without keys."""
        if not self._files.key_name:
            return {}
        chunks = self._table.chunks_by_key()
        return chunks if self._forgotten_key is None else {self._forgotten_key: 0} | chunks

    @property
    def used_bytes(self) -> int:
        """Total size of all files, bytes."""
        return self._table.used_blocks * BLOCK_BYTES

    @property
    def error(self) -> str:
        """Why appends fail or stored chunks are not durable. Empty without an error."""
        if self._log.error is not None:
            return str(self._log.error)
        homeless_bytes = self._table.homeless_blocks * BLOCK_BYTES
        if homeless_bytes:
            return (
                f"files were removed from {self._folder.path}; {homeless_bytes} bytes of chunks in them are still "
                "to be written again"
            )
        return ""

    def recover(self, *, isolated: bool = False) -> Recovery:
        """Recovers the records in the folder, and starts the upkeep thread. With `isolated`, chunks of different
        tenants that have the same id and encoding are different chunks. A chunk that was deleted or replaced before
        that is not recovered. Raises DiskError, and EncryptionKeyError for files of a key that is not given."""
        self.forgotten, self._forgotten_key = read_forgotten(self._folder.path, self._files)
        recovery = recover(self._table, self._log, self._layouts, self.forgotten, isolated=isolated)
        # Not started by the first append: its calling thread may be pinned to a CPU, which a new thread inherits.
        self._upkeep.start(self._log)
        self._recovered = True
        self._finish_isolation(recovery, isolated=isolated)
        return recovery

    def _finish_isolation(self, recovery: Recovery, *, isolated: bool) -> None:
        """Makes sure that a later recovery finds no superseded record either. Until that is durable, each start looks
        for them again. Raises DiskError."""
        try:
            for meta, sequence in recovery.superseded:
                self._log.append_tombstone(meta, sequence)
            if recovery.superseded:
                self._log.sync_all()
            if self._folder.isolated != isolated:
                self._folder.set_isolated(isolated=isolated)
        except OSError as error:
            raise disk_error(error, f"recovering the disk tier in {self._folder.path}") from error
        except DiskError as error:  # full, most likely
            log.warning("%s; the next start will try again to keep tenants apart", error)

    def append(self, meta: RecordMeta, views: Sequence[memoryview], *, sync: bool) -> Location:
        """Appends a chunk, whose bytes are the concatenated views. With `sync`, syncs it, so that it survives a power
        loss.

        Raises DiskFullError, DiskReadOnlyError, DiskFailedError, ChunkTooLargeError, StorageError. After an exception
        the chunk is not stored, although a recovery after a crash may find it.
        """
        self._require_open()
        if not 0 < meta.size_bytes == sum(view.nbytes for view in views):
            raise StorageError(
                f"chunk {meta.chunk_id.short} was announced with a size of {meta.size_bytes} bytes, "
                f"but has {sum(view.nbytes for view in views)}"
            )
        most_bytes = self.limit_bytes - self._log.segment_bytes
        # The first record of a segment comes with two more blocks: the segment's first block and one of its index.
        if self.record_bytes(meta.size_bytes) > most_bytes - 2 * BLOCK_BYTES:
            raise ChunkTooLargeError(
                f"chunk {meta.chunk_id.short} has {meta.size_bytes} bytes, but {self._folder.path} may hold only "
                f"{most_bytes}; give the node more disk"
            )
        return self._log.append(meta, views, sync=sync)

    def read(self, location: Location, offset: int, views: Sequence[memoryview]) -> None:
        """Fills the views with the chunk's bytes from `offset` on, without verifying them. Reads directly, without a
        copy, into aligned memory from an aligned offset: both are multiples of `read_unit_bytes`.

        Raises ChunkNotFoundError when the chunk was deleted or moved: look up its location again. Raises
        TruncatedChunkError when its file was truncated, ChecksumError when encrypted bytes were changed, and
        DiskFailedError when the disk cannot read it after retries.
        """
        self._require_open()
        size_bytes = sum(view.nbytes for view in views)
        end = offset + size_bytes
        with self._table.reading(location) as found:
            if found is None:
                raise ChunkNotFoundError(f"there is no chunk at {location} in {self._folder.path}")
            segment, blocks = found
            readable_bytes = segment.layout.capacity_bytes(blocks - 1)
            if not 0 <= offset <= end <= readable_bytes + -readable_bytes % self.read_unit_bytes:
                raise StorageError(f"bytes [{offset}, {end}) lie outside the chunk at {location}")
            try:
                segment.layout.read(segment.file, block_of(location), blocks - 1, offset, views)
            except FileEndsError as error:
                raise TruncatedChunkError(
                    f"segment {segment.number} in {self._folder.path} is damaged: {error.strerror}"
                ) from error
            except OSError as error:
                raise disk_error(error, f"reading segment {segment.number} in {self._folder.path}") from error

    def delete(self, location: Location) -> None:
        """Marks a chunk as dead. A restart may still recover it. Does nothing when it is already dead."""
        self._require_open()
        self._table.mark_dead(location)

    @property
    def newest_sequence(self) -> int:
        """Sequence number of the newest append. Later appends have higher numbers."""
        return self._log.newest_sequence

    def forget(self, meta: RecordMeta, sequence: int) -> None:
        """Writes a tombstone, so that a restart does not recover deleted records of this id and encoding up to number
        `sequence`. The tombstone survives a power loss after `sync_period_s`. Take `newest_sequence` when the chunk is
        deleted: later appends are kept, but an append that overlaps with that call may be forgotten. Raises
        DiskError."""
        self._require_open()
        self._log.append_tombstone(meta, sequence)

    def keep_forgotten(self, records: ForgottenRecords) -> None:
        """Makes records dead for every later recovery, durably. Raises DiskError."""
        self._require_open()
        with self._forgetting:
            self._write_forgotten(records)

    def _write_forgotten(self, records: ForgottenRecords) -> None:
        """Call with `_forgetting` held. Raises DiskError."""
        key_name = self._files.key_name
        write_forgotten(self._folder.path, records, self._files)
        self.forgotten, self._forgotten_key = records, key_name

    def _update_forgotten(self) -> None:
        """Writes the file of forgotten records again if its key is not the first one any more. On a full disk that is
        left for later, because compaction must go on there. Raises DiskError."""
        if (
            self._forgotten_key in (None, self._files.key_name)
            or time.monotonic() < self._update_forgotten_at_s
        ):
            return
        try:
            with self._forgetting:
                self._write_forgotten(self.forgotten)
        except DiskFullError as error:
            log.info("the forgotten tenants are not encrypted with the current key yet: %s", error)
            self._update_forgotten_at_s = time.monotonic() + FULL_PAUSE_S

    def sync(self) -> None:
        """Syncs all appended records, so that they survive a power loss. Raises DiskError."""
        self._require_open()
        self._log.sync_all()

    def compact(self, relocate: Relocate, lost: Lost | None = None) -> bool:
        """Frees the space of dead chunks in one segment, if enough of it is dead, or moves the chunks of a segment
        that is not encrypted with the first key. True when there may be more to do.

        Calls `relocate(meta, old, new)`, without a lock, for every live chunk that was copied. `relocate` returns True
        when the index now has the new location, and False when the index does not have the old one, which then stays
        valid until it is deleted. Calls `lost(meta, location)`, without a lock, for every damaged live chunk; its space
        is freed once it is deleted. Raises DiskError; then nothing was freed and nothing is lost.
        """
        self._require_open()
        self._update_forgotten()
        return self._compactor.step(relocate, lost, self._upkeep.stopping)

    def check_integrity(self) -> None:
        """Raises StorageError unless the metadata of all segments is consistent."""
        self._table.check_integrity()

    def close(self) -> None:
        """Stops a running compaction, and syncs and seals all segments. No append may be in progress. Raises DiskError
        when records could not be synced, and closes the store in any case."""
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

    def _require_open(self) -> None:
        if self._closed or not self._recovered:
            raise DiskFailedError(
                f"the disk tier in {self._folder.path} is {'closed' if self._closed else 'not recovered yet'}"
            )
