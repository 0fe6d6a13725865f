"""`kvstore bench recompute`: documents reused in other contexts, by which of their tokens are computed again.

run.py        the benchmark: cluster, model, what is measured in which order
methods.py    what is compared: selectors, with drift and without
prompts.py    one text in pieces, documents with a question that needs two of them, and the prompt that is timed
facts.py      what such questions are about
engine.py     the model that is measured, with and without the service
tiers.py      where the documents are stored: memory, or a disk of a chosen speed
fidelity.py   KL against full recompute
times.py      seconds to the first token, and tokens a second of a batch
tuning.py     the ratio that is tuned for a tier, and the sweep that it has to keep up with
rows.py, targets.py, plot.py    what came of it
"""

from kvstore_bench.recompute.methods import DEFAULT_METHODS
from kvstore_bench.recompute.plot import plot_recompute
from kvstore_bench.recompute.run import Options, Result, run
from kvstore_bench.recompute.targets import targets
from kvstore_bench.recompute.tiers import TIERS

__all__ = ["DEFAULT_METHODS", "TIERS", "Options", "Result", "plot_recompute", "run", "targets"]
