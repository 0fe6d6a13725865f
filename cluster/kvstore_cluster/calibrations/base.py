"""Metadata of calibrations, and the interface of a mirror for their copies."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """Metadata of a calibration that is stored or about to be stored. Digests have 32 bytes."""

    digest: bytes
    model_digest: bytes
    size_bytes: int


class CalibrationMirror(Protocol):
    """Stores copies of calibrations outside the coordinator's disk. Every method raises CatalogueError when the copies
    cannot be reached."""

    def keep(self, record: CalibrationRecord, file: Path) -> None:
        """Copies a calibration and makes it the newest of its model, atomically."""

    def records(self) -> list[CalibrationRecord]:
        """Records of all copies, oldest first."""

    def pieces(self, record: CalibrationRecord) -> Iterator[bytes]:
        """Yields the bytes of a copy. The caller must verify the digest. Raises DamagedCalibrationError when bytes are
        missing."""
