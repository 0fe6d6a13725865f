"""The link is cut while a request loads KV: the time of that request, and of others that load nothing."""

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from kvstore_bench.shaping.netns import NetworkNamespace
from kvstore_bench.vllm.completions import Answer
from kvstore_bench.vllm.http_call import RequestError
from kvstore_bench.vllm.policies import Deployment
from kvstore_bench.vllm.prompts import Prompt

_SILENCE_S = 400.0
_POLL_S, _PAUSE_S = 0.001, 0.2
_BEFORE = 7
"""Unrelated requests before the cut; the first two warm up."""
_HIT_ATTEMPTS = 8
"""A connector that plans may compute at first, until it knows the link."""
_BACK_LIMIT_S = 60.0
_BEGIN_LIMIT_S = 30.0


@dataclass(slots=True)
class Unrelated:
    """A request to the same engine that loads nothing."""

    began_s: float
    """On the clock of the cut."""
    ttft_s: float | None
    """None: it failed."""


@dataclass(slots=True)
class CutRun:
    """What was seen of one policy. Times of the cut request count from when it was sent."""

    hit: Answer
    """The same request over the whole link."""
    hit_bytes: int
    before_s: list[float]
    """TTFT of unrelated requests before the cut."""
    cut_after_s: float
    answer: Answer | None = None
    failure: str | None = None
    unrelated: list[Unrelated] = field(default_factory=list)
    reuse_back_after_s: float | None = None
    """From the end of the cut to the next request that reuses KV; None: not within a minute."""


def run_cut(
    deployment: Deployment,
    link: NetworkNamespace,
    prompt: Prompt,
    fillers: Iterator[Prompt],
    share: float,
    cut_s: float,
) -> CutRun:
    """`fillers` are prompts that nobody has asked. The link is cut when `share` of the bytes of a load have arrived,
    for `cut_s` at least, and until the request has ended. Raises RequestError when it fails before the cut."""
    engine = deployment.completions
    for _ in range(_HIT_ATTEMPTS):
        deployment.forget()
        before = link.bytes_from_inside
        hit = engine.complete(prompt.ids, 1, _SILENCE_S)
        hit_bytes = link.bytes_from_inside - before
        if hit.reused_tokens:
            break
    else:
        raise RequestError(f"no token is reused over the whole link, in {_HIT_ATTEMPTS} requests")
    before_s = [engine.complete(next(fillers).ids, 1, _SILENCE_S).ttft_s for _ in range(_BEFORE)][2:]
    deployment.forget()
    with ThreadPoolExecutor(1) as threads:
        start_bytes, sent_s = link.bytes_from_inside, time.monotonic()
        asked = threads.submit(engine.complete, prompt.ids, 1, _SILENCE_S)
        while link.bytes_from_inside - start_bytes < share * hit_bytes and not asked.done():
            if time.monotonic() > sent_s + _BEGIN_LIMIT_S:
                break
            time.sleep(_POLL_S)
        link.cut()
        found = CutRun(hit, hit_bytes, before_s, time.monotonic() - sent_s)
        try:
            _ask_others(deployment, fillers, asked, sent_s, cut_s, found)
        finally:
            link.mend()
        try:
            found.answer = asked.result()
        except RequestError as error:
            found.failure = str(error)
    found.reuse_back_after_s = _reuse_is_back(deployment, prompt)
    return found


def _ask_others(
    deployment: Deployment,
    fillers: Iterator[Prompt],
    asked: "Future[Answer]",
    sent_s: float,
    cut_s: float,
    found: CutRun,
) -> None:
    end_s = time.monotonic() + cut_s
    while time.monotonic() < end_s:
        began_s = time.monotonic() - sent_s
        try:
            ttft_s: float | None = deployment.completions.complete(next(fillers).ids, 1, _SILENCE_S).ttft_s
        except RequestError:
            ttft_s = None
        found.unrelated.append(Unrelated(began_s, ttft_s))
        time.sleep(_PAUSE_S)
    while not asked.done() and time.monotonic() < end_s + _SILENCE_S:
        time.sleep(_PAUSE_S)


def _reuse_is_back(deployment: Deployment, prompt: Prompt) -> float | None:
    mended_s = time.monotonic()
    while time.monotonic() < mended_s + _BACK_LIMIT_S:
        try:
            deployment.forget()
            asked_s = time.monotonic()
            if deployment.completions.complete(prompt.ids, 1, _SILENCE_S).reused_tokens:
                return asked_s - mended_s
        except RequestError:
            time.sleep(_PAUSE_S)
        time.sleep(_PAUSE_S)
    return None


def cut_row(policy: str, run: CutRun, cold_ttft_s: float) -> dict[str, Any]:
    """`cold_ttft_s` is the TTFT of the same prompt without reuse.

    The row: {policy, cold_ttft_s; hit_ttft_s, hit_reused_tokens and hit_link_bytes of the request over the whole link;
    cut_after_s, from sending the request to the cut; cut_request_ttft_s and cut_request_reused_tokens (null: it failed,
    and failure says why); unrelated_before_ttft_s; unrelated_failed; reuse_back_after_s}. Further fields have the
    number, the median TTFT and the longest TTFT of the unrelated requests that ended while the cut request waited
    (unrelated_waiting), that overlapped with its computation (unrelated_beside_compute), and that came afterwards
    (unrelated_after). unrelated_over_before is the median TTFT of the first and last of these groups over that before
    the cut."""
    ended_s = run.answer.ttft_s if run.answer is not None else float("inf")
    # The engine shares its cores between requests while it computes, so requests beside the computation stand apart.
    computes_from_s = ended_s - 1.1 * cold_ttft_s
    waiting = [one for one in run.unrelated if one.began_s + (one.ttft_s or 0.0) < computes_from_s]
    after = [one for one in run.unrelated if one.began_s > ended_s]
    beside = [one for one in run.unrelated if one not in waiting and one not in after]
    before_s = statistics.median(run.before_s)
    row: dict[str, Any] = {
        "policy": policy,
        "cold_ttft_s": cold_ttft_s,
        "hit_ttft_s": run.hit.ttft_s,
        "hit_reused_tokens": run.hit.reused_tokens,
        "hit_link_bytes": run.hit_bytes,
        "cut_after_s": run.cut_after_s,
        "cut_request_ttft_s": run.answer.ttft_s if run.answer is not None else None,
        "cut_request_reused_tokens": run.answer.reused_tokens if run.answer is not None else None,
        "failure": run.failure,
        "unrelated_before_ttft_s": before_s,
        "unrelated_failed": sum(one.ttft_s is None for one in run.unrelated),
        "reuse_back_after_s": run.reuse_back_after_s,
    }
    for name, group in (("waiting", waiting), ("beside_compute", beside), ("after", after)):
        times_s = [one.ttft_s for one in group if one.ttft_s is not None]
        row[f"unrelated_{name}"] = len(group)
        row[f"unrelated_{name}_ttft_s"] = statistics.median(times_s) if times_s else None
        row[f"unrelated_{name}_ttft_max_s"] = max(times_s, default=None)
    delayed: Sequence[float] = [one.ttft_s for one in waiting + after if one.ttft_s is not None]
    row["unrelated_over_before"] = statistics.median(delayed) / before_s if delayed else None
    return row
