"""The benchmark: one question after the other, every policy in turn, behind links of every bandwidth."""

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
from kvstore_bench.link.links import UNSHAPED_BPS, Links, links_of
from kvstore_bench.link.options import Options
from kvstore_bench.link.orders import ask
from kvstore_bench.link.policies import Policy, policies_named, stored_encodings
from kvstore_bench.link.rows import Cell, Row, row_of
from kvstore_bench.link.stream import ByteSource
from kvstore_bench.shaping.jitter import parse_jitter, playing
from kvstore_bench.store.processes import Process
from kvstore_client import ClientSettings
from kvstore_client.cluster_view import ClusterView
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_service.calibration import Report
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.settings import settings_of

_MEMORY_BYTES = 2 << 30
_STORE_S, _ANSWER_S = 1800.0, 900.0
_SETTLE_S = 0.05
"""Between two questions: what the first one had asked for and no longer wants has left the link."""
_QUESTIONS_BEFORE = 3
"""Before a step, of a policy that plans: it knows the link as it has been, and not as the last question left it."""
# A policy without a choice is asked less often where its first answer took so many times as long as a full prefill, and
# that many seconds: nobody would use it there, and it would take most of the time.
_SLOWER, _SLOWER_S, _REPEATS_OF_SLOWER = 2.0, 5.0, 3
_MUCH_SLOWER, _MUCH_SLOWER_S = 4.0, 2.5


@dataclass(frozen=True, slots=True)
class Result:
    meta: dict[str, Any]
    rows: list[Row]
    left_out: list[str]


def run(options: Options, report: Report) -> Result:
    """Raises ConfigurationError, and StartupError where a process or a namespace cannot be had."""
    policies, left_out = _possible(options, report)
    cells = list(_cells(options, report))
    with ExitStack() as stack:
        report.advance("start", 0, 3)
        links = stack.enter_context(links_of(options.shaper))
        cluster = stack.enter_context(
            EmbeddedCluster(settings_of(memory=_MEMORY_BYTES, listen=f"{links.host}:0"))
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
            routes=links.routes([*_endpoints(cluster.address), source.address]),
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
        """What the last adaptive run did."""
        files = (self._options.trace, self._options.timeline)
        choosing = [policy.name for policy in self._policies if policy.chooses]
        if not choosing or not any(files):
            return
        ask(
            self._engine, self._report, _ANSWER_S, "draw", policy=choosing[0], title=cell.title,
            trace=files[0] and str(files[0]), timeline=files[1] and str(files[1]),
        )  # fmt: skip

    def _judge(self) -> None:
        """How faithful policies are whose choice does not depend on the link. `cold`, the first of them, is what they
        are compared with."""
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
        """Each policy once, beginning with another one each time; the first round warms up, but what is far too slow
        is asked that once only."""
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
        said: dict[str, Any] = ask(
            self._engine, self._report, _ANSWER_S, "measure", policy=policy.name, tokens=tokens, judge=judge
        )
        return said


def _rounds_for(ttft_s: float, cold_s: float) -> float:
    """At most, the first one counted, for a policy that took so long in it."""
    if ttft_s > max(_MUCH_SLOWER * cold_s, _MUCH_SLOWER_S):
        return 1
    return 1 + _REPEATS_OF_SLOWER if ttft_s > max(_SLOWER * cold_s, _SLOWER_S) else math.inf


def _possible(options: Options, report: Report) -> tuple[tuple[Policy, ...], list[str]]:
    """Without a peer that is not installed, and why."""
    policies = policies_named(options.policies, options.floor, options.adaptive)
    if (options.trace or options.timeline) and not any(policy.chooses for policy in policies):
        raise ConfigurationError("--trace and --timeline show what adaptive did: name it with --policy, too")
    if cachegen.installed() or not any(policy.kind == "cachegen" for policy in policies):
        return policies, []
    left_out = [f"without LMCache's CacheGen; to have it: {cachegen.INSTALL}"]
    report.note(left_out[0])
    return tuple(policy for policy in policies if policy.kind != "cachegen"), left_out


def _cells(options: Options, report: Report) -> Iterator[Cell]:
    if not options.bandwidths_bps or not options.tokens or not options.jitters:
        raise ConfigurationError("nothing to measure: name a bandwidth, a length and a jitter at least")
    for tokens in options.tokens:
        if tokens < CHUNK_TOKENS or tokens % CHUNK_TOKENS:
            raise ConfigurationError(
                f"{tokens} tokens: whole chunks are reused, so ask for multiples of {CHUNK_TOKENS}"
            )
        for jitter in options.jitters:
            pattern = parse_jitter(jitter)
            if pattern.full_bps is not None and len(options.bandwidths_bps) > 1:
                report.note(f"{jitter} brings its own bandwidths and is measured once")
            rates = options.bandwidths_bps if pattern.full_bps is None else (pattern.full_bps,)
            for bandwidth_bps in rates:
                yield Cell(bandwidth_bps, tokens, _name(jitter), pattern.schedule(bandwidth_bps))


def _name(jitter: str) -> str:
    """A trace without its folder."""
    kind, colon, given = jitter.partition(":")
    return f"{kind}:{Path(given).name}" if kind == "trace" else kind + colon + given


def _prefill(
    options: Options, policies: Sequence[Policy], shared: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """Not behind the links, and gone before anything is measured."""
    with ExitStack() as stack:
        process = _process(stack, "prefilling", "prefill", ())
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


def _endpoints(address: str) -> list[str]:
    view = ClusterView(ClientSettings(address=address))
    try:
        members = view.membership().members
    finally:
        view.close()
    return [address, *(e for member in members for e in (member.endpoint, member.bulk_endpoint) if e)]


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
        "ttft_s": "seconds from the question to the first token of the answer: median of the rounds after the first",
        "kl": "nats a token over the text's own continuation, from what the model says behind its own KV",
        "left_out": list(left_out),
    }
