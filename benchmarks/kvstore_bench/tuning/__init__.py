"""`kvstore tune`: which share of reused text to compute again, for each tier that it may come from.

run.py       a cluster of its own, documents in it, one tier after the other
tiers.py     memory, disks of a known speed, the disk as it is
rounds.py    seconds to the first token, measured in turns
tune.py      Algorithm 1 of CacheTune on one tier, and a sweep beside it
plot.py      a picture of both
"""

from kvstore_bench.tuning.plot import plot_ratios
from kvstore_bench.tuning.run import Options, Result, tune_tiers
from kvstore_bench.tuning.tiers import TIERS

__all__ = ["TIERS", "Options", "Result", "plot_ratios", "tune_tiers"]
