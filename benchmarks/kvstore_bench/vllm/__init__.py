"""Benchmarks with real vLLM servers: behind slow links (benchmarks/vllm_*.py), and on a GPU (benchmarks/gpu/vllm.py).

Servers and clients:
engine.py, lmcache.py, stores.py      vLLM, LMCache's server, and the stores; process.py runs them
completions.py, http_call.py          the HTTP client, which notes when tokens arrive
policies.py                           what is compared behind links, and how each is started
servers.py                            the link, and all policies with their stores behind it
calibration.py, models.py             the calibration that lossy KV needs, and the models

vllm_ttft.py: options.py, prompts.py, links.py describe what is asked; run.py asks it in rounds; rows.py, targets.py and
plot.py turn the answers into the result.
vllm_miss_path.py: miss_path.py. vllm_link_cut.py: link_cut.py.
gpu/vllm.py: setups.py has the connectors, exchange.py asks pairs of engines, worker_extension.py looks into their KV.
"""
