"""`kvstore bench link`: compares policies of a worker by their time to first token over slow links.

run.py        runs the benchmark: starts cluster and processes, measures all combinations in rounds
policies.py   the compared policies
prompts.py    the text: a document that is reused, a question, and the continuation of the text
prefill.py    process that stores the document's KV before the measurement
engine.py     measured process: a model, and a client for each policy
clients.py    makes the client of a policy; also one that runs the stages of a fetch one after the other
links.py      the links between the measured process and the cluster, in user space or in a network namespace
stream.py     sends and receives plain bytes, in place of the CacheGen streams that no server here stores
orders.py     the messages between the benchmark and its two processes
options.py    options of the benchmark
rows.py, targets.py, plot.py    rows, checks against targets, and plot of the result
"""

from kvstore_bench.link.options import Options
from kvstore_bench.link.plot import plot_link
from kvstore_bench.link.policies import DEFAULT_POLICIES, POLICIES
from kvstore_bench.link.run import Result, run
from kvstore_bench.link.targets import targets

__all__ = ["DEFAULT_POLICIES", "POLICIES", "Options", "Result", "plot_link", "run", "targets"]
