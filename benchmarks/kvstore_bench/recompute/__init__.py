"""`kvstore bench recompute`: documents reused in other contexts, with some of their tokens recomputed.

run.py        runs the benchmark: starts the cluster, times all methods in each tier, then measures fidelity
methods.py    the compared methods: selectors, with drift and without
prompts.py    the prompts: one text in pieces, documents with a question that needs two of them, and the timed prompt
facts.py      made-up facts for such questions
engine.py     the measured model, with and without the service
tiers.py      the storage tiers of the documents: memory, or a disk of a chosen speed
fidelity.py   KL relative to full recompute
times.py      time to first token, and throughput of a batch
tuning.py     tunes the ratio for a tier, and measures a sweep of ratios for comparison
rows.py, targets.py, plot.py    rows, checks against targets, and plot of the result
"""

from kvstore_bench.recompute.methods import DEFAULT_METHODS
from kvstore_bench.recompute.plot import plot_recompute
from kvstore_bench.recompute.run import Options, Result, run
from kvstore_bench.recompute.targets import targets
from kvstore_bench.recompute.tiers import TIERS

__all__ = ["DEFAULT_METHODS", "TIERS", "Options", "Result", "plot_recompute", "run", "targets"]
