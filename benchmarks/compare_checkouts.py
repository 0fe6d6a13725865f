"""Compare get, put and lookup times, and times to first token, of two checkouts of this repository, measured
alternately.

python benchmarks/compare_checkouts.py --before DIR --after DIR [--rounds 7] [--sizes 64,1024] [--answers] [--json FILE]

`--answers` adds SmolLM2-135M in float32 with exact KV: a hit of a prefix of 2,048 tokens, and six documents of 512
tokens in another order with 15 % of them recomputed.

Each checkout has its own server and client processes. Each round measures both, so that other programs on the machine
slow both equally. Both folders need their generated stubs (`make install`, or the command in hatch_build.py). `change`
is the median over rounds of (speed of `after` / speed of `before`) - 1.

Compare a checkout with itself first: on two cores shared with other programs, two runs of the same code differed by up
to 18 % in rate and 5 % in median time at 64 KiB. Run the script several times, because the memory layout of a process,
which affects its speed, stays the same for as long as it runs.
"""

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvstore_bench.results import write_results
from kvstore_bench.store.processes import Process

KIB = 1024
_PACKAGES = ("benchmarks", ".", "api", "codec", "client", "cluster")
# The second is the location in checkouts that are older than the package `kvstore_bench`.
_STORE_BENCHMARK = {
    "kvstore_bench.store": "benchmarks/kvstore_bench/store",
    "kvstore_service.bench.store": "kvstore_service/bench/store",
}
ANSWERS = {"prefix": 2048, "documents": 3072}
"""Reused tokens of each kind of answer."""
_RESIDENT_BYTES, _MOST_KEYS = 128 << 20, 8
_ANSWER_TIMEOUT_S = 120.0
_LOOKUPS = """
import json, sys
from {benchmark}.lookup import measure_lookups
for _ in sys.stdin:
    print(json.dumps(measure_lookups({address!r}, {rounds})), flush=True)
"""
# Asks for a prefix or for documents, whichever it is told, and prints the seconds to the first token.
_ANSWERS = """
import sys, time
import torch
from {package}.codec.texts import default_sources
from {package}.recompute.engine import Engine
from {package}.recompute.prompts import Prompts
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.recompute import Recompute
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.models import SMOLLM2, DType, load_model

# Without arguments, which older checkouts name differently.
with EmbeddedCluster() as cluster:
    model, tokenizer = load_model(SMOLLM2, DType.FLOAT32)
    exact = dict(encoding="exact-zstd", accept=("exact-zstd",), floor=None)
    engine = Engine(cluster.address, model, tokenizer, **exact)
    prompts = Prompts(default_sources(), tokenizer)
    prompt = prompts.timed(3072)
    engine.store(prompts, prompt)
    prompt = prompt.ordered([3, 0, 5, 1, 4, 2])
    client = connect(cluster.address, fetch_policy="fixed", **exact)
    cached = CachedModel(model, client)
    text = prompt.ids[:, :2088]
    one = dict(max_new_tokens=1, do_sample=False)
    cached.generate(text[:, :2048], **one)
    client.store.flush()
    cached.store = False
    print("ready", flush=True)
    for line in sys.stdin:
        began_s = time.perf_counter()
        if "prefix" in line:
            cached.generate(text, **one)
            assert cached.last_report.reused_tokens == 2048, cached.last_report
        else:
            engine.ask(prompt, Recompute(selector="focus", ratio=0.15))
        print(time.perf_counter() - began_s, flush=True)
"""


class Checkout:
    """The processes of one checkout. They end when `stack` is closed."""

    def __init__(
        self, name: str, folder: Path, lookup_rounds: int, stack: contextlib.ExitStack, *, answers: bool
    ) -> None:
        self.name = name
        self._folder = folder.resolve()
        self._stack = stack
        benchmark = next(
            module for module, path in _STORE_BENCHMARK.items() if (self._folder / path).is_dir()
        )
        if answers:
            script = _ANSWERS.replace("{package}", benchmark.removesuffix(".store"))
            self._answers = self._started("-c", script)
            self._answers.line()
            for kind in ANSWERS:  # the first one warms up
                self.answer_s(kind)
        address = self._started("-m", f"{benchmark}.server", "kvstore").line()
        self._client = self._started("-m", f"{benchmark}.client", "kvstore", address)
        script = _LOOKUPS.format(benchmark=benchmark, address=address, rounds=lookup_rounds)
        self._lookups = self._started("-c", script)

    def tell(self, command: str, **arguments: Any) -> Any:
        """Sends a command to the client process. Returns its answer."""
        self._client.tell(command, **arguments)
        return self._client.answer(_ANSWER_TIMEOUT_S)

    def lookups(self) -> list[dict[str, Any]]:
        """Measures lookups. Returns the rows of `measure_lookups`."""
        self._lookups.tell("measure")
        answer: list[dict[str, Any]] = self._lookups.answer(_ANSWER_TIMEOUT_S)
        return answer

    def answer_s(self, kind: str) -> float:
        """Seconds to the first token, `kind` being a name in ANSWERS."""
        self._answers.tell(kind)
        seconds: float = self._answers.answer(_ANSWER_TIMEOUT_S)
        return seconds

    def _started(self, *arguments: str) -> Process:
        path = os.pathsep.join(str(self._folder / package) for package in _PACKAGES)
        # Ray's actors import from the current folder first.
        inside = ["env", f"--chdir={self._folder}", f"PYTHONPATH={path}"]
        process = Process(self.name, [*inside, sys.executable, "-P", *arguments])
        self._stack.callback(process.close)
        return process


def compare(
    before: Path,
    after: Path,
    sizes_bytes: Sequence[int],
    rounds: int,
    seconds: float,
    lookup_rounds: int,
    *,
    answers: bool,
) -> Iterator[dict[str, Any]]:
    """Yields rows {op, size_bytes or chunks, unit, before, after, change, ...}, each as soon as it was measured."""
    with contextlib.ExitStack() as stack:
        checkouts = [
            Checkout(name, folder, lookup_rounds, stack, answers=answers)
            for name, folder in (("before", before), ("after", after))
        ]
        for size_bytes in sizes_bytes:
            yield from _transfers(checkouts, size_bytes, rounds, seconds)
        if lookup_rounds:
            yield from _lookups(checkouts, rounds)
        if answers:
            yield from _answers(checkouts, rounds)


def _transfers(
    checkouts: Sequence[Checkout], size_bytes: int, rounds: int, seconds: float
) -> Iterator[dict[str, Any]]:
    keys = list(range(min(_MOST_KEYS, max(2, _RESIDENT_BYTES // size_bytes))))
    for checkout in checkouts:
        checkout.tell("resident", size_bytes=size_bytes, keys=keys)
    for op in ("get", "put"):
        speeds: dict[str, list[float]] = {checkout.name: [] for checkout in checkouts}
        medians_ms: dict[str, list[float]] = {checkout.name: [] for checkout in checkouts}
        for turn in range(rounds):
            for checkout in _in_turn(checkouts, turn):
                times_s = checkout.tell("time", method=op, seconds=seconds)
                speeds[checkout.name].append(size_bytes * len(times_s) / sum(times_s) / 1e9)
                medians_ms[checkout.name].append(1e3 * statistics.median(times_s))
        row = {"op": op, "size_bytes": size_bytes, "unit": "GB/s"}
        yield row | _compared(speeds, slower_is_more=False)
        # On a busy machine most calls are not disturbed. The rate depends mainly on the calls that are, the median does
        # not.
        row = {"op": f"{op} p50", "size_bytes": size_bytes, "unit": "ms"}
        yield row | _compared(medians_ms, slower_is_more=True)
    for checkout in checkouts:
        checkout.tell("check")
        checkout.tell("forget")


def _lookups(checkouts: Sequence[Checkout], rounds: int) -> Iterator[dict[str, Any]]:
    times_ms: dict[tuple[str, str], dict[str, list[float]]] = {}
    chunks = 0
    for turn in range(rounds):
        for checkout in _in_turn(checkouts, turn):
            for row in checkout.lookups():
                chunks = row["chunks"]
                for quantile in ("p50", "p99"):
                    of_checkout = times_ms.setdefault((row["op"], quantile), {})
                    of_checkout.setdefault(checkout.name, []).append(row[f"{quantile}_ms"])
    for (op, quantile), measured in times_ms.items():
        row = {"op": f"{op} {quantile}", "chunks": chunks, "unit": "ms"}
        yield row | _compared(measured, slower_is_more=True)


def _answers(checkouts: Sequence[Checkout], rounds: int) -> Iterator[dict[str, Any]]:
    for kind, tokens in ANSWERS.items():
        times_s: dict[str, list[float]] = {checkout.name: [] for checkout in checkouts}
        for turn in range(rounds):
            for checkout in _in_turn(checkouts, turn):
                times_s[checkout.name].append(checkout.answer_s(kind))
        row = {"op": f"TTFT {kind}", "tokens": tokens, "unit": "s"}
        yield row | _compared(times_s, slower_is_more=True)


def _in_turn(checkouts: Sequence[Checkout], turn: int) -> Sequence[Checkout]:
    return checkouts if turn % 2 else checkouts[::-1]


def _compared(measured: dict[str, list[float]], *, slower_is_more: bool) -> dict[str, Any]:
    pairs = zip(measured["before"], measured["after"], strict=True)
    ratios = [before / after if slower_is_more else after / before for before, after in pairs]
    row: dict[str, Any] = {}
    for name, values in measured.items():
        row |= {
            name: statistics.median(values),
            f"{name}_min": min(values),
            f"{name}_max": max(values),
        }
    return row | {"change": statistics.median(ratios) - 1, "rounds": len(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="folder of the first checkout")
    parser.add_argument("--after", type=Path, required=True, help="folder of the second checkout")
    parser.add_argument(
        "--rounds", type=int, default=7, help="number of rounds; each measures both checkouts"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="duration of a measurement of gets or puts"
    )
    parser.add_argument(
        "--sizes",
        default="64,1024,4096,16384",
        help="sizes of values in KiB, comma-separated; empty to measure only lookups",
    )
    parser.add_argument(
        "--lookup-rounds",
        type=int,
        default=5,
        help="in each round, measure this many times 20 lookups; 0 to measure none",
    )
    parser.add_argument("--answers", action="store_true", help="measure times to first token, too")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    rows = []
    print(f"{'op':<20} {'size':>10}  {'before':>26}  {'after':>26}   change")
    sizes_bytes = [int(size) * KIB for size in filter(None, arguments.sizes.split(","))]
    for row in compare(
        arguments.before,
        arguments.after,
        sizes_bytes,
        arguments.rounds,
        arguments.seconds,
        arguments.lookup_rounds,
        answers=arguments.answers,
    ):
        rows.append(row)
        size = (
            f"{row['size_bytes'] // KIB} KiB"
            if "size_bytes" in row
            else str(row.get("chunks", row.get("tokens")))
        )
        spans = [
            f"{row[name]:.3f} ({row[f'{name}_min']:.3f}-{row[f'{name}_max']:.3f})"
            for name in ("before", "after")
        ]
        print(
            f"{row['op']:<20} {size:>10}  {spans[0]:>26}  {spans[1]:>26}  {row['change']:+7.1%}  {row['unit']}",
            flush=True,
        )
    write_results(rows, arguments.json, {"rounds": arguments.rounds, "seconds": arguments.seconds})


if __name__ == "__main__":
    main()
