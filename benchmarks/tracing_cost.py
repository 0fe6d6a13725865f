"""Measure what traces cost a request: fetches with and without them in turns.

    python benchmarks/tracing_cost.py [--rounds 60] [--tokens 4096] [--json F]

A coordinator and a storage node run in this process twice, once with and once without a collector, which is a process
of its own. A small random model answers a prompt whose KV is stored; a request is lookup, fetch and one token. Rows:
{traced, requests, median_ms, quartile_ms, processor_ms}, and the added share in percent in the meta.
"""

import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from kvstore_bench import write_results
from kvstore_bench.output_options import JsonFile

sys.path.insert(0, str(Path(__file__).parents[1]))  # the collector is one of the tests' parts


def main(
    rounds: Annotated[int, typer.Option(min=2, help="Requests with traces, and as many without.")] = 60,
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of the prompt.")] = 4096,
    json_file: JsonFile = None,
) -> None:
    """Measure what traces cost a request."""
    import torch

    from kvstore_client import connect
    from kvstore_client.engines.transformers import CachedModel
    from tests.client.models import random_prompt, tiny_model
    from tests.otlp_collector import Collector
    from tests.service.test_tracing import traced

    wall: dict[bool, list[float]] = {False: [], True: []}
    processor: dict[bool, list[float]] = {False: [], True: []}
    prompt = random_prompt(tokens + 16, seed=1)
    with ExitStack() as stack:
        collector = stack.enter_context(Collector())
        ask = {}
        for on in (False, True):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            endpoint = collector.grpc if on else None
            cluster = stack.enter_context(traced(folder, endpoint))
            client = stack.enter_context(
                connect(cluster.front.address, otlp_endpoint=endpoint or "", fetch_policy="fixed")
            )
            cached = CachedModel(tiny_model("llama", torch.bfloat16), client)
            cached.generate(prompt, max_new_tokens=1, do_sample=False)
            client.store.flush()
            ask[on] = cached
        for number in range(2 * rounds + 4):
            on = number % 2 == 1
            began_s, used_s = time.perf_counter(), time.process_time()
            ask[on].generate(prompt, max_new_tokens=1, do_sample=False)
            if number >= 4:
                wall[on].append(time.perf_counter() - began_s)
                processor[on].append(time.process_time() - used_s)
        spans = len(collector.spans)
    rows = [_row(on, wall[on], processor[on]) for on in (False, True)]
    meta = {
        "added_percent": 100 * (rows[1]["median_ms"] / rows[0]["median_ms"] - 1),
        "added_processor_percent": 100 * (rows[1]["processor_ms"] / rows[0]["processor_ms"] - 1),
        "spans": spans,
        "tokens": tokens,
    }
    print(*rows, meta, sep="\n")
    write_results(rows, json_file, meta)


def _row(on: bool, wall_s: list[float], processor_s: list[float]) -> dict[str, Any]:
    return {
        "traced": on,
        "requests": len(wall_s),
        "median_ms": 1e3 * statistics.median(wall_s),
        "quartile_ms": 1e3 * statistics.quantiles(wall_s, n=4)[0],
        "processor_ms": 1e3 * statistics.median(processor_s),
    }


if __name__ == "__main__":
    typer.run(main)
