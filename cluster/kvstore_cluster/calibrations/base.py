"""What is known of a calibration without reading it, and where copies may be kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """A calibration the registry has, or is about to be given. Digests have 32 bytes."""

    digest: bytes
    model_digest: bytes
    size_bytes: int


class CalibrationMirror(Protocol):
    """Keeps copies elsewhere. All methods raise CatalogueError when that cannot be reached."""

    def keep(self, record: CalibrationRecord, file: Path) -> None:
        """Copies a whole calibration and makes it the newest of its model: all of that or nothing."""

    def records(self) -> list[CalibrationRecord]:
        """Oldest first."""

    def pieces(self, record: CalibrationRecord) -> Iterator[bytes]:
        """The bytes, as they were kept; the caller checks the digest. Raises DamagedCalibrationError when some are
        missing."""
