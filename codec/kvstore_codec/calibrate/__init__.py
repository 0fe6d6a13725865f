"""Learning a `Calibration` from what a model does to real text. Knows tensors, no model.

`Moments` gathers sums over a text, `error_metric` says which errors the model notices, `fit_periods` solves for the
maps, and `find_step` finds the step of a wanted fidelity.
"""

from kvstore_codec.calibrate.fit import fit_periods
from kvstore_codec.calibrate.metric import error_metric, square_root
from kvstore_codec.calibrate.moments import Moments
from kvstore_codec.calibrate.step import find_step

__all__ = ["Moments", "error_metric", "find_step", "fit_periods", "square_root"]
