"""The calibration registry: opaque files, identified by the blake3 digest of their bytes."""

from kvstore_cluster.calibrations.base import CalibrationMirror, CalibrationRecord
from kvstore_cluster.calibrations.redis import RedisMirror
from kvstore_cluster.calibrations.registry import CalibrationRegistry

__all__ = ["CalibrationMirror", "CalibrationRecord", "CalibrationRegistry", "RedisMirror"]
