"""Time to first token of real vLLM servers whose KV lies behind slow links.

run.py          the benchmark: rounds over policies, links and prompts
policies.py     what is compared, and how each is started
options.py, prompts.py, links.py      what is asked for
completions.py  the HTTP client, which notes when tokens arrive
engine.py, lmcache.py, stores.py, process.py    the servers
calibration.py  what lossy encodings need
rows.py, targets.py, plot.py          what came of it
"""
