"""`kvstore tune`: finds the best recompute ratio of reused text for each storage tier.

run.py       starts a cluster, stores documents, and tunes one tier after the other
tiers.py     the tiers: memory, disks of a known speed, and this machine's disk
rounds.py    measures seconds to the first token in alternating rounds
tune.py      Algorithm 1 of CacheTune on one tier, and a sweep for comparison
plot.py      plots both
"""

from kvstore_bench.tuning.plot import plot_ratios
from kvstore_bench.tuning.run import Options, Result, tune_tiers
from kvstore_bench.tuning.tiers import TIERS

__all__ = ["TIERS", "Options", "Result", "plot_ratios", "tune_tiers"]
