"""`kvstore bench codec`: bits, fidelity and speed of KV encodings of this project and of others.

texts -> fidelity.Passage -> a Method (ours, minmax, cachegen) -> Coded -> fidelity.judge -> rows -> plot
"""

from kvstore_bench.codec.methods import QUICK_ROWS, ROWS
from kvstore_bench.codec.plot import plot_rate_distortion
from kvstore_bench.codec.run import Options, Result, run

__all__ = ["QUICK_ROWS", "ROWS", "Options", "Result", "plot_rate_distortion", "run"]
