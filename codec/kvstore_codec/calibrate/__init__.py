"""Fitting of a `Calibration` to a model's KV of sample text. This package works on tensors and imports no model.

`Moments` accumulates sums over a text, `error_metric` computes how much errors affect the model, `fit_periods` solves
for the maps, and `find_step` searches for the step of a required fidelity.
"""

from kvstore_codec.calibrate.fit import fit_periods
from kvstore_codec.calibrate.metric import error_metric, square_root
from kvstore_codec.calibrate.moments import Moments
from kvstore_codec.calibrate.step import find_step

__all__ = ["Moments", "error_metric", "find_step", "fit_periods", "square_root"]
