"""The calibration registry on the coordinator's disk.

Each calibration is one file, `<sequence>-<model digest>-<digest>.kvcal`. The file names are the only index, so index
and files cannot disagree. The highest sequence number of a model belongs to its newest calibration.
"""

import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from kvstore_api.calibrations import MAX_CALIBRATION_BYTES, MAX_PIECE_BYTES
from kvstore_cluster.calibrations.base import CalibrationMirror, CalibrationRecord
from kvstore_cluster.durable import rename_durably
from kvstore_codec.errors import (
    CalibrationSizeError,
    CalibrationTooLargeError,
    CatalogueError,
    DamagedCalibrationError,
    UnknownCalibrationError,
)

log = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{8,})-([0-9a-f]{64})-([0-9a-f]{64})\.kvcal")
_UNFINISHED = ".unfinished-"


class CalibrationRegistry:
    """Stores calibrations. Thread-safe; methods may block on disk and mirror. Its files are in `folder`, which is
    created when missing, and which belongs to the process that has locked the catalogue beside it.

    With a `mirror`, the mirror has a copy of every calibration. At the start, calibrations that only one side has are
    copied to the other, in the mirror's order. Reads use only the folder, so they need no connection to the mirror.

    Raises CatalogueError when folder or mirror cannot be used.
    """

    def __init__(self, folder: Path, mirror: CalibrationMirror | None = None) -> None:
        self._folder = folder
        self._mirror = mirror
        self._lock = threading.Lock()
        self._stored: dict[int, CalibrationRecord] = {}  # by sequence number, in rising order
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in folder.glob(f"{_UNFINISHED}*"):
                left_over.unlink()
            found = sorted(
                (int(match[1]), bytes.fromhex(match[3]), bytes.fromhex(match[2]), path.stat().st_size)
                for path in folder.iterdir()
                if (match := _NAME.fullmatch(path.name))
            )
        except OSError as error:
            raise self._unusable(error) from error
        for sequence, digest, model_digest, size_bytes in found:
            self._stored[sequence] = CalibrationRecord(digest, model_digest, size_bytes)
        if mirror is not None:
            self._synchronise(mirror)

    def put(self, record: CalibrationRecord, pieces: Iterable[bytes]) -> None:
        """Stores the bytes in `pieces` durably, as the newest calibration of their model. After any exception,
        including one from `pieces`, nothing is stored.

        Raises CalibrationTooLargeError before it reads a byte, CalibrationSizeError for another size than announced,
        DamagedCalibrationError for another digest, and CatalogueError when disk or mirror cannot store it.
        """
        self._store(record, pieces, self._mirror)

    def pieces(self, digest: bytes) -> Iterator[bytes]:
        """Yields the bytes of a calibration in pieces of at most 1 MiB. Raises UnknownCalibrationError, CatalogueError
        when the file cannot be read, and DamagedCalibrationError, after the last piece, when the digest does not
        match."""
        try:
            with self._open(digest) as file:
                found = blake3()
                while piece := file.read(MAX_PIECE_BYTES):
                    found.update(piece)
                    yield piece
        except OSError as error:
            raise self._unusable(error) from error
        if found.digest() != digest:
            log.error("calibration %s is damaged: %s", _short(digest), file.name)
            raise DamagedCalibrationError(
                f"calibration {_short(digest)} is damaged on disk; publish it again"
            )

    def find(self, model_digest: bytes) -> CalibrationRecord | None:
        """The newest calibration of a model. None when it has none."""
        with self._lock:
            self._forget_removed()
            return next(
                (record for record in reversed(self._stored.values()) if record.model_digest == model_digest),
                None,
            )

    def records(self) -> tuple[CalibrationRecord, ...]:
        """Records of all stored calibrations, oldest first."""
        with self._lock:
            self._forget_removed()
            return tuple(self._stored.values())

    def _synchronise(self, mirror: CalibrationMirror) -> None:
        copies = mirror.records()
        known = {(copy.model_digest, copy.digest) for copy in copies}
        for sequence, record in self._stored.items():
            if (record.model_digest, record.digest) not in known:
                log.error("calibration %s was not in the mirror and is copied again", _short(record.digest))
                mirror.keep(record, self._path(sequence, record))
                copies.append(record)
        if list(self._stored.values()) == copies:
            return
        for record in copies:
            try:
                self._store(record, mirror.pieces(record), None)
            except (DamagedCalibrationError, CalibrationSizeError) as error:
                log.warning("calibration %s cannot be read from the mirror: %s", _short(record.digest), error)

    def _store(
        self, record: CalibrationRecord, pieces: Iterable[bytes], mirror: CalibrationMirror | None
    ) -> None:
        if record.size_bytes > MAX_CALIBRATION_BYTES:
            raise CalibrationTooLargeError(
                f"calibration {_short(record.digest)} has {record.size_bytes} bytes; "
                f"at most {MAX_CALIBRATION_BYTES} are accepted"
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # the folder may have been removed
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=_UNFINISHED, delete=False) as file:
                unfinished = Path(file.name)
                try:
                    for piece in _verified(record, pieces):
                        file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                    if mirror is not None:
                        mirror.keep(record, unfinished)
                    self._publish(record, unfinished)
                finally:
                    unfinished.unlink(missing_ok=True)  # already renamed if it was published
        except OSError as error:
            raise self._unusable(error) from error

    def _open(self, digest: bytes) -> BinaryIO:
        with self._lock:  # held until the file is open, because storing the calibration again renames it
            self._forget_removed()
            newest = [sequence for sequence, record in self._stored.items() if record.digest == digest]
            if not newest:
                raise UnknownCalibrationError(f"there is no calibration {_short(digest)}")
            return self._path(newest[-1], self._stored[newest[-1]]).open("rb")

    def _publish(self, record: CalibrationRecord, unfinished: Path) -> None:
        with self._lock:
            sequence = max(self._stored, default=0) + 1
            rename_durably(unfinished, self._path(sequence, record))
            for older in [s for s, known in self._stored.items() if known == record]:
                self._path(older, record).unlink(missing_ok=True)
                del self._stored[older]
            self._stored[sequence] = record
        log.info("calibration %s stored, %d bytes", _short(record.digest), record.size_bytes)

    def _forget_removed(self) -> None:
        """Drops calibrations whose files were removed; they must be published again. Call with the lock held."""
        for sequence, record in list(self._stored.items()):
            if not self._path(sequence, record).exists():
                log.error(
                    "calibration %s was removed from %s; publish it again",
                    _short(record.digest),
                    self._folder,
                )
                del self._stored[sequence]

    def _path(self, sequence: int, record: CalibrationRecord) -> Path:
        return self._folder / f"{sequence:08d}-{record.model_digest.hex()}-{record.digest.hex()}.kvcal"

    def _unusable(self, error: OSError) -> CatalogueError:
        return CatalogueError(
            f"the calibration folder {self._folder} cannot be used ({error.strerror}); "
            "make it writable or choose another --data-dir"
        )


def _verified(record: CalibrationRecord, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yields `pieces`. Raises CalibrationSizeError or DamagedCalibrationError unless they match `record`."""
    found, size_bytes = blake3(), 0
    for piece in pieces:
        size_bytes += len(piece)
        if size_bytes > record.size_bytes:
            break
        found.update(piece)
        yield piece
    if size_bytes != record.size_bytes:
        came = "more" if size_bytes > record.size_bytes else size_bytes
        raise CalibrationSizeError(
            f"calibration {_short(record.digest)} was announced with a size of {record.size_bytes} bytes, "
            f"but has {came}"
        )
    if found.digest() != record.digest:
        raise DamagedCalibrationError(
            f"the bytes announced as calibration {_short(record.digest)} have the digest "
            f"{_short(found.digest())}; send them again"
        )


def _short(digest: bytes) -> str:
    return digest.hex()[:12]
