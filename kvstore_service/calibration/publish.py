"""Making a calibration known to a running cluster."""

from pathlib import Path

from kvstore_client import connect
from kvstore_codec.calibration import Calibration
from kvstore_codec.errors import CalibrationError, ConfigurationError


def publish_calibration(calibration: Calibration, address: str) -> bytes:
    """Makes it the newest of its model at the coordinator `address`, and returns its digest. Raises PublishError when
    the cluster does not take it, and says why."""
    with connect(address) as client:
        return client.calibrations.publish(calibration.to_bytes(), calibration.model_digest)


def read_calibration(path: Path) -> Calibration:
    """Raises ConfigurationError for a file that cannot be read, CalibrationError for one that is no calibration."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read the calibration {path}: {error.strerror}") from error
    try:
        return Calibration.from_bytes(data)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error
