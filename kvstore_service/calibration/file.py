"""Writes calibrations to files."""

import os
from pathlib import Path

from kvstore_codec.calibration import Calibration


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Writes the file atomically, even if several processes write the same file. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(calibration.to_bytes())
    unfinished.replace(path)
