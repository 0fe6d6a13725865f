"""Runs the benchmark: asks one question at a time, with all policies in alternation, at each bandwidth."""

import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore_bench.codec import cachegen
from kvstore_bench.link.links import UNSHAPED_BPS, Links, endpoints_of, links_of
from kvstore_bench.link.options import Options
from kvstore_bench.link.orders import ask
from kvstore_bench.link.policies import Policy, policies_named, stored_encodings
from kvstore_bench.link.rows import Cell, Row, row_of
from kvstore_bench.link.stream import ByteSource
from kvstore_bench.shaping.jitter import parse_jitter, playing
from kvstore_bench.store.processes import Process
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_service.calibration import Report
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.settings import settings_of

_MEMORY_BYTES = 2 << 30
_STORE_S, _ANSWER_S = 1800.0, 900.0
_SETTLE_S = 0.05
"""Pause between two questions. Data that the first one requested but no longer needs leaves the link."""
_QUESTIONS_BEFORE = 3
"""Untimed questions before a step in bandwidth. A planning policy then knows the bandwidth before the step, not that
of the last question."""
# A policy without a choice gets fewer rounds if its first answer took this many times as long as a full prefill, and
# at least this many seconds. Nobody would use it there, and it would take most of the benchmark's time.
_SLOWER, _SLOWER_S, _REPEATS_OF_SLOWER = 2.0, 5.0, 3
_MUCH_SLOWER, _MUCH_SLOWER_S = 4.0, 2.5


@dataclass(frozen=True, slots=True)
class Result:
    meta: dict[str, Any]
    rows: list[Row]
    left_out: list[str]
    """Reasons why requested policies have no rows."""


def run(options: Options, report: Report) -> Result:
    """Runs the benchmark. Raises ConfigurationError for options that cannot be measured, StartupError when a process or
    a network namespace cannot be started."""
    policies, left_out = _possible(options, report)
    cells = list(_cells(options, report))
    with ExitStack() as stack:
        report.advance("start", 0, 3)
        links = stack.enter_context(links_of(options.shaper))
        cluster = stack.enter_context(
            EmbeddedCluster(settings_of(memory=_MEMORY_BYTES, listen=f"{links.host}:0", insecure=True))
        )
        source = stack.enter_context(ByteSource(links.host))
        report.advance("start", 1, 3)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-link-"))
        needs_cachegen = any(policy.kind == "cachegen" for policy in policies)
        shared = {
            "address": cluster.address,
            "dtype": options.dtype,
            "tokens": list(options.tokens),
            "cachegen_folder": folder if needs_cachegen else None,
        }
        stored = _prefill(options, policies, shared, report)
        engine = _process(stack, "the measured engine", "engine", links.command)
        ask(
            engine,
            report,
            _ANSWER_S,
            "load",
            **shared,
            routes=links.routes([*endpoints_of(cluster.address), source.address]),
            policies=[policy.name for policy in policies],
            floor=options.floor,
            adaptive=dict(options.adaptive),
            cachegen_bytes=stored["cachegen_bytes"],
            source=source.address,
        )
        report.advance("start", 3, 3)
        bench = _Bench(options, policies, links, engine, report)
        rows = bench.rows(cells)
        bench.draw(cells[-1])
    return Result(_meta(options, policies, stored, left_out), rows, left_out)


class _Bench:
    def __init__(
        self,
        options: Options,
        policies: Sequence[Policy],
        links: Links,
        engine: Process,
        report: Report,
    ) -> None:
        self._options = options
        self._policies = policies
        self._links = links
        self._engine = engine
        self._report = report
        self._judged: dict[tuple[str, int], dict[str, Any]] = {}

    def rows(self, cells: Sequence[Cell]) -> list[Row]:
        """Measures all policies in each cell. Returns their rows."""
        self._judge()
        rows: list[Row] = []
        rounds = self._options.repeats + 1
        for index, cell in enumerate(cells):
            samples: dict[str, list[dict[str, Any]]] = {policy.name: [] for policy in self._policies}
            wanted: dict[str, float] = {policy.name: rounds for policy in self._policies}
            for number in range(rounds):
                self._report.advance("questions", index * rounds + number, len(cells) * rounds)
                self._round(cell, number, wanted, samples)
            rows += [row_of(cell, policy, samples, self._judged, self._options) for policy in self._policies]
        self._report.advance("questions", len(cells) * rounds, len(cells) * rounds)
        return rows

    def draw(self, cell: Cell) -> None:
        """Writes trace and timeline of the last adaptive run, if the options ask for them."""
        files = (self._options.trace, self._options.timeline)
        choosing = [policy.name for policy in self._policies if policy.chooses]
        if not choosing or not any(files):
            return
        ask(
            self._engine, self._report, _ANSWER_S, "draw", policy=choosing[0], title=cell.title,
            trace=files[0] and str(files[0]), timeline=files[1] and str(files[1]),
        )  # fmt: skip

    def _judge(self) -> None:
        """Measures the fidelity of policies whose encodings do not depend on the link. `cold` is the first of them and
        the reference of all others."""
        self._links.set_bandwidth(UNSHAPED_BPS)
        steps = [
            (policy, tokens)
            for tokens in self._options.tokens
            for policy in self._policies
            if not policy.chooses
        ]
        for index, (policy, tokens) in enumerate(steps):
            self._report.advance("judge", index, len(steps))
            self._judged[policy.name, tokens] = self._ask(policy, tokens, judge=True)
        self._report.advance("judge", len(steps), len(steps))

    def _round(
        self,
        cell: Cell,
        number: int,
        wanted: dict[str, float],
        samples: dict[str, list[dict[str, Any]]],
    ) -> None:
        """Asks each policy once. Each round begins with another policy. The first round is the warm-up; a policy that
        is far too slow is asked in no other."""
        turn = number % len(self._policies)
        for policy in (*self._policies[turn:], *self._policies[:turn]):
            name = policy.name
            if number >= wanted[name]:
                continue
            if policy.chooses and cell.schedule.settles:
                self._links.set_bandwidth(cell.schedule.bandwidth_bps(0.0))
                for _ in range(_QUESTIONS_BEFORE):
                    self._ask(policy, cell.tokens, judge=False)
            with playing(self._links, cell.schedule):
                sample = self._ask(policy, cell.tokens, judge=policy.chooses and number == wanted[name] - 1)
            samples[name].append(sample)
            if "kl" in sample:
                self._judged[name, cell.tokens] = sample
            if number == 0 and not policy.chooses:
                wanted[name] = min(wanted[name], _rounds_for(sample["ttft_s"], samples["cold"][0]["ttft_s"]))

    def _ask(self, policy: Policy, tokens: int, *, judge: bool) -> dict[str, Any]:
        time.sleep(_SETTLE_S)
        sample: dict[str, Any] = ask(
            self._engine, self._report, _ANSWER_S, "measure", policy=policy.name, tokens=tokens, judge=judge
        )
        return sample


def _rounds_for(ttft_s: float, cold_s: float) -> float:
    """Largest number of rounds, including the first, of a policy that took `ttft_s` in the first."""
    if ttft_s > max(_MUCH_SLOWER * cold_s, _MUCH_SLOWER_S):
        return 1
    return 1 + _REPEATS_OF_SLOWER if ttft_s > max(_SLOWER * cold_s, _SLOWER_S) else math.inf


def _possible(options: Options, report: Report) -> tuple[tuple[Policy, ...], list[str]]:
    """The policies that can be measured, and the reasons why others cannot: their peer is not installed."""
    policies = policies_named(options.policies, options.floor, options.adaptive)
    if (options.trace or options.timeline) and not any(policy.chooses for policy in policies):
        raise ConfigurationError("--trace and --timeline show the adaptive policy: add --policy adaptive")
    if cachegen.installed() or not any(policy.kind == "cachegen" for policy in policies):
        return policies, []
    left_out = [f"LMCache's CacheGen is not installed; to install it: {cachegen.INSTALL}"]
    report.note(left_out[0])
    return tuple(policy for policy in policies if policy.kind != "cachegen"), left_out


def _cells(options: Options, report: Report) -> Iterator[Cell]:
    if not options.bandwidths_bps or not options.tokens or not options.jitters:
        raise ConfigurationError(
            "nothing to measure: name at least one bandwidth, one document length and one jitter"
        )
    for tokens in options.tokens:
        if tokens < CHUNK_TOKENS or tokens % CHUNK_TOKENS:
            raise ConfigurationError(
                f"a document of {tokens} tokens is not whole chunks, and only these are reused; "
                f"use multiples of {CHUNK_TOKENS}"
            )
        for jitter in options.jitters:
            pattern = parse_jitter(jitter)
            if pattern.full_bps is not None and len(options.bandwidths_bps) > 1:
                report.note(f"{jitter} sets the bandwidth itself, so it is measured once")
            rates = options.bandwidths_bps if pattern.full_bps is None else (pattern.full_bps,)
            for bandwidth_bps in rates:
                yield Cell(bandwidth_bps, tokens, _name(jitter), pattern.schedule(bandwidth_bps))


def _name(jitter: str) -> str:
    """The jitter's name in the result: a trace without its folder."""
    kind, colon, given = jitter.partition(":")
    return f"{kind}:{Path(given).name}" if kind == "trace" else kind + colon + given


def _prefill(
    options: Options, policies: Sequence[Policy], shared: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """Stores the documents, in a process that is not limited by the links and ends before the measurement."""
    with ExitStack() as stack:
        process = _process(stack, "the prefill", "prefill", ())
        encodings = list(stored_encodings(policies))
        stored: dict[str, Any] = ask(
            process, report, _STORE_S, "store", **shared, encodings=encodings, quick=options.quick
        )
    report.advance("start", 2, 3)
    return stored


def _process(stack: ExitStack, name: str, module: str, prefix: Sequence[str]) -> Process:
    process = Process(name, (*prefix, sys.executable, "-m", f"kvstore_bench.link.{module}"))
    stack.callback(process.close)
    return process


def _meta(
    options: Options, policies: Sequence[Policy], stored: Mapping[str, Any], left_out: Sequence[str]
) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct",
        "dtype": options.dtype,
        "shaper": options.shaper,
        "floor": options.floor,
        "repeats": options.repeats,
        "adaptive": dict(options.adaptive),
        "policies": {policy.name: dict(policy.settings) for policy in policies},
        "stored": stored_encodings(policies),
        "calibration": stored["calibration"],
        "quick": options.quick,
        "ttft_s": "seconds from the question to the first token of the answer; median of the rounds after the first",
        "kl": "nats per token of the text's continuation, relative to the model's predictions after its own KV",
        "left_out": list(left_out),
    }
