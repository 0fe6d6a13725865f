"""Calibrating a model: from text files to the artefact that the codec works by."""

from kvstore_service.calibration.file import write_calibration
from kvstore_service.calibration.passages import Passage, Plan, plan_passages
from kvstore_service.calibration.run import AIM, RATES, Options, Report, calibrate

__all__ = [
    "AIM",
    "RATES",
    "Options",
    "Passage",
    "Plan",
    "Report",
    "calibrate",
    "plan_passages",
    "write_calibration",
]
