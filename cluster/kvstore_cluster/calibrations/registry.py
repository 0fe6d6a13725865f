"""The calibration registry on the coordinator's disk.

Each is one file, `<sequence>-<model digest>-<digest>.kvcal`. The names are the whole index, so there is nothing beside
the files that could disagree with them; the highest sequence number of a model is its newest calibration.
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
    """Thread-safe. Keeps its files in `folder`, which is made when missing and belongs to one process at a time: the
    one that holds the catalogue beside it.

    With a `mirror` every calibration is there too. At the start either side gets what only the other one has, in the
    mirror's order; later clients are served from the folder, whether the mirror can be reached or not.

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
        """Stores the bytes in `pieces` and makes them the newest calibration of their model. Returns once that would
        survive a power loss; whatever is raised, also by `pieces`, nothing is stored.

        Raises CalibrationTooLargeError before a byte is taken, CalibrationSizeError as soon as the size cannot come out
        as announced, DamagedCalibrationError for another digest, and CatalogueError when disk or mirror do not take it.
        """
        self._store(record, pieces, self._mirror)

    def pieces(self, digest: bytes) -> Iterator[bytes]:
        """The bytes of a calibration, at most 1 MiB at a time. Raises UnknownCalibrationError, CatalogueError when the
        file cannot be read, and, after the last piece, DamagedCalibrationError when they do not have the digest."""
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
        """The newest calibration of a model."""
        with self._lock:
            self._forget_removed()
            return next(
                (record for record in reversed(self._stored.values()) if record.model_digest == model_digest),
                None,
            )

    def records(self) -> tuple[CalibrationRecord, ...]:
        """Everything stored, oldest first."""
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
                log.warning("calibration %s cannot be had from the mirror: %s", _short(record.digest), error)

    def _store(
        self, record: CalibrationRecord, pieces: Iterable[bytes], mirror: CalibrationMirror | None
    ) -> None:
        if record.size_bytes > MAX_CALIBRATION_BYTES:
            raise CalibrationTooLargeError(
                f"calibration {_short(record.digest)} has {record.size_bytes} bytes; "
                f"at most {MAX_CALIBRATION_BYTES} are taken"
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
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
                    unfinished.unlink(missing_ok=True)  # it has another name once it was published
        except OSError as error:
            raise self._unusable(error) from error

    def _open(self, digest: bytes) -> BinaryIO:
        with self._lock:  # until it is open: when it is stored anew, the file takes another name
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
        """Lets go of calibrations whose files somebody has removed: they have to be published again. The caller has the
        lock."""
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
    """Passes on `pieces` and raises unless they are what `record` announces."""
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
            f"calibration {_short(record.digest)} was announced with {record.size_bytes} bytes, but {came} came"
        )
    if found.digest() != record.digest:
        raise DamagedCalibrationError(
            f"the bytes announced as calibration {_short(record.digest)} have the digest "
            f"{_short(found.digest())}; send them again"
        )


def _short(digest: bytes) -> str:
    return digest.hex()[:12]
