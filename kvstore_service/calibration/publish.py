"""Publishes a calibration to a running cluster."""

from pathlib import Path

from kvstore_client import connect
from kvstore_codec.calibration import Calibration
from kvstore_codec.errors import CalibrationError, ConfigurationError


def publish_calibration(calibration: Calibration, address: str) -> bytes:
    """Publishes the calibration at the coordinator `address` as the newest of its model, and returns its digest. Raises
    PublishError with the reason if the cluster refuses it."""
    with connect(address) as client:
        return client.calibrations.publish(calibration.to_bytes(), calibration.model_digest)


def read_calibration(path: Path) -> Calibration:
    """Reads a calibration. Raises ConfigurationError for an unreadable file, and CalibrationError for one that is not a
    calibration."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read the calibration {path}: {error.strerror}") from error
    try:
        return Calibration.from_bytes(data)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error
