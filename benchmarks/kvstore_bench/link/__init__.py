"""`kvstore bench link`: time to first token behind slow links, by what a worker does about them.

run.py        the benchmark: cluster, processes, cells, rounds
policies.py   what is compared
prompts.py    the text: a document that is reused, a question, and how it goes on
prefill.py    a process that stores the document's KV, and then ends
engine.py     the process that is measured: a model, and a client for each policy
clients.py    the client of a policy; the stages of a fetch one after the other, for comparison
links.py      the links between that process and the cluster, in user space or in a network namespace
stream.py     the bytes of CacheGen, which no service of ours serves
options.py    what it is asked for
rows.py, targets.py, plot.py    what came of it
"""

from kvstore_bench.link.options import Options
from kvstore_bench.link.plot import plot_link
from kvstore_bench.link.policies import DEFAULT_POLICIES, POLICIES
from kvstore_bench.link.run import Result, run
from kvstore_bench.link.targets import targets

__all__ = ["DEFAULT_POLICIES", "POLICIES", "Options", "Result", "plot_link", "run", "targets"]
