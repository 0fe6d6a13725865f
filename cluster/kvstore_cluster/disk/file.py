"""Reads and writes one segment file without the page cache."""

import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kvstore_cluster.disk.record import BLOCK_BYTES
from kvstore_codec.errors import DiskError, DiskFailedError, DiskFullError, DiskReadOnlyError

log = logging.getLogger(__name__)

_SCRATCH_BYTES = 1 << 20
_MAX_VIEWS = os.sysconf("SC_IOV_MAX")
_ERRORS = {
    errno.ENOSPC: DiskFullError,
    errno.EDQUOT: DiskFullError,
    errno.EFBIG: DiskFullError,
    errno.EROFS: DiskReadOnlyError,
    errno.EACCES: DiskReadOnlyError,
    errno.EPERM: DiskReadOnlyError,
}
# Pauses between attempts of a failed read.
_READ_PAUSES_S = (0.001, 0.02)
_scratch = threading.local()


class FileEndsError(OSError):
    """The file ends before the requested range, because it was truncated. A retry is useless."""


class SegmentFile:
    """Positional I/O in whole blocks. Thread-safe. Every method may block and raises OSError.

    With `direct` (O_DIRECT), bytes move directly between the disk and aligned views, such as those of an arena.
    Unaligned views go through a small buffer. Without `direct`, the file tells the page cache to drop the bytes.
    """

    def __init__(self, path: Path, *, create: bool, direct: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC if create else os.O_RDONLY
        self._fd = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o644)
        self._direct = direct
        self.read_unit_bytes = BLOCK_BYTES
        """Offset, length and memory of a direct read are multiples of this; the opener may know of a smaller one."""

    def is_at(self, path: Path) -> bool:
        """Whether `path` still names this file. True when the file system cannot tell."""
        try:
            return os.path.samestat(os.fstat(self._fd), path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def size_bytes(self) -> int:
        return os.fstat(self._fd).st_size

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        """Writes the views one after another at `offset`, a multiple of the block size, and pads the last block with
        zeros."""
        scratch = aligned_scratch()
        batch: list[memoryview] = []
        start = used = 0  # bounds of the part of `scratch` that is not in the batch yet
        for view in views:
            while view.nbytes:
                if used % BLOCK_BYTES == 0 and view.nbytes >= BLOCK_BYTES and _is_aligned(view, BLOCK_BYTES):
                    whole = view.nbytes - view.nbytes % BLOCK_BYTES
                    batch += (scratch[start:used], view[:whole]) if used > start else (view[:whole],)
                    start = used
                else:
                    if used == scratch.nbytes:
                        offset = self._write_all(offset, [*batch, scratch[start:used]])
                        batch, start, used = [], 0, 0
                    whole = min(view.nbytes, scratch.nbytes - used)
                    scratch[used : used + whole] = view[:whole]
                    used += whole
                view = view[whole:]
        padding = -used % BLOCK_BYTES
        scratch[used : used + padding] = bytes(padding)
        if used > start:
            batch.append(scratch[start : used + padding])
        self._write_all(offset, batch)

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fills the views with the bytes from `offset` on. Views need not be aligned, nor `offset`."""
        scratch, unit = aligned_scratch(), self.read_unit_bytes
        batch, rest = _in_place(views, unit) if offset % unit == 0 else ([], list(views))
        position = offset + sum(view.nbytes for view in batch)
        missing = sum(view.nbytes for view in rest)
        start = offset
        while batch or missing:
            skip = position % unit
            span = min(skip + missing, scratch.nbytes)
            window = scratch[: span + -span % unit]
            found = self._read_some(start if batch else position - skip, [*batch, window])
            if found < sum(view.nbytes for view in batch) + span:
                raise FileEndsError(errno.EIO, f"the file ends before byte {position - skip + span}")
            batch = []
            rest = scatter(window[skip:span], rest)
            missing -= span - skip
            position += span - skip
        self._forget(offset, position - offset)

    def read_some(self, offset: int, view: memoryview) -> int:
        """Reads whole blocks into an aligned view from a block's offset on. Returns the bytes read, fewer at the file
        end."""
        found = self._read_some(offset, [view])
        self._forget(offset, found)
        return found

    def sync(self) -> None:
        os.fdatasync(self._fd)
        self._forget(0, 0)

    def close(self) -> None:
        os.close(self._fd)

    def _write_all(self, offset: int, views: Sequence[memoryview]) -> int:
        for batch in _batches(views):
            while batch:
                written = os.pwritev(self._fd, batch, offset)
                offset += written
                batch = without(batch, written)
        return offset

    def _read_some(self, offset: int, views: Sequence[memoryview]) -> int:
        found = 0
        for batch in _batches(views):
            while batch:
                count = self._preadv(batch, offset + found)
                if not count:
                    return found
                found += count
                if count % self.read_unit_bytes:  # a partial block is the end of the file
                    return found
                batch = without(batch, count)
        return found

    def _preadv(self, views: Sequence[memoryview], offset: int) -> int:
        """Reads once, and retries a failed read: a lack of memory or a loose cable may be transient."""
        for pause_s in _READ_PAUSES_S:
            try:
                return os.preadv(self._fd, views, offset)
            except OSError as error:
                log.info("reading at offset %d of a segment failed, trying again: %s", offset, error)
                time.sleep(pause_s)
        return os.preadv(self._fd, views, offset)

    def _forget(self, offset: int, length: int) -> None:
        if not self._direct:
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)


def aligned_buffer(size_bytes: int) -> memoryview:
    """Allocates zeroed memory that is aligned for direct I/O."""
    return memoryview(mmap.mmap(-1, max(size_bytes, BLOCK_BYTES)))


def aligned_scratch() -> memoryview:
    """A small aligned buffer of the calling thread. Valid until the thread calls another function that uses it."""
    if not hasattr(_scratch, "view"):
        _scratch.view = aligned_buffer(_SCRATCH_BYTES)
    view: memoryview = _scratch.view
    return view


def disk_error(error: OSError, what: str) -> DiskError:
    """Converts an OSError into a DiskError. `what` names the failed operation, with the path."""
    reason = error.strerror or str(error)
    kind = _ERRORS.get(error.errno or 0, DiskFailedError)
    if kind is DiskFullError:
        return DiskFullError(f"{what}: {reason}; free space on that disk or lower the node's disk limit")
    if kind is DiskReadOnlyError:
        return DiskReadOnlyError(f"{what}: {reason}; make it writable or choose another data folder")
    return DiskFailedError(f"{what}: {reason}; check that disk")


def _is_aligned(view: memoryview, unit: int) -> bool:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address % unit == 0


def _in_place(views: Sequence[memoryview], unit: int) -> tuple[list[memoryview], list[memoryview]]:
    """Splits consecutive views into those that direct I/O can fill with whole units, and the rest."""
    batch: list[memoryview] = []
    for done, view in enumerate(views):
        whole = view.nbytes - view.nbytes % unit
        if not whole or not _is_aligned(view, unit):
            return batch, list(views[done:])
        batch.append(view[:whole])
        if whole < view.nbytes:
            return batch, [view[whole:], *views[done + 1 :]]
    return batch, []


def scatter(source: memoryview, views: Sequence[memoryview]) -> list[memoryview]:
    """Copies `source` into `views`, and returns the unfilled rest of the views."""
    for done, view in enumerate(views):
        count = min(view.nbytes, source.nbytes)
        view[:count] = source[:count]
        source = source[count:]
        if count < view.nbytes:
            return [view[count:], *views[done + 1 :]]
    return []


def _batches(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Splits the views into batches that one system call accepts."""
    for first in range(0, len(views), _MAX_VIEWS):
        yield [view for view in views[first : first + _MAX_VIEWS] if view.nbytes]


def without(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """The views without their first `count` bytes."""
    for done, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[done + 1 :]]
        count -= view.nbytes
    return []
