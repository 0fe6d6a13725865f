"""Fits the codec's calibration to a model, from text files."""

from kvstore_service.calibration.file import write_calibration
from kvstore_service.calibration.passages import Passage, Plan, plan_passages
from kvstore_service.calibration.run import RATES, TARGET_SHARE, Options, Report, calibrate

__all__ = [
    "TARGET_SHARE",
    "RATES",
    "Options",
    "Passage",
    "Plan",
    "Report",
    "calibrate",
    "plan_passages",
    "write_calibration",
]
