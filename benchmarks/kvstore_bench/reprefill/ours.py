"""The measured systems that are ours: a part of the prefix, all of it, and none of it."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel

from kvstore_bench.reprefill.prompts import Prompts, Question
from kvstore_bench.reprefill.systems import Asked
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.fetch import FetchReport
from kvstore_client.reuse.report import GenerationReport
from kvstore_client.settings import AUTO, Budget
from kvstore_codec.errors import StartupError
from kvstore_service.cluster_stats import cluster_stats

_ANSWER: dict[str, Any] = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False}
PATIENT: dict[str, Any] = {"lookup_timeout_s": 20.0, "fetch_timeout_s": 600.0, "stall_timeout_s": 60.0}
"""A slow disk is measured, not given up."""
_CANARY_S = 60.0


class Cold:
    """The plain model."""

    name = "cold"

    def __init__(self, model: PreTrainedModel, prompts: Prompts) -> None:
        self._model, self._prompts = model, prompts

    def ask(self, question: Question) -> Asked:
        began_s = time.perf_counter()
        self._model.generate(self._prompts.prompt(question), **_ANSWER)
        return Asked(time.perf_counter() - began_s)

    def close(self) -> None:
        """Nothing to close."""


Pair = tuple[float | None, str]
"""Budget (None: the whole prefix) and encoding."""


class Reusing:
    """CachedModel: `contiguous` with a budget, `full` without one."""

    def __init__(
        self, address: str, model: PreTrainedModel, prompts: Prompts, budget: Budget | None, **settings: Any
    ) -> None:
        self._address, self._prompts, self._budget = address, prompts, budget
        self._client = connect(address, **(PATIENT | {"fetch_policy": "fixed"} | settings))
        self._cached = CachedModel(model, self._client, store=False)
        self._client.prepare(self._cached.spec).result()
        # A comparison that computes beside the first question would slow it.
        self._cached.canary.refusal(self._cached.spec, wait_s=_CANARY_S)

    def ask(self, question: Question) -> Asked:
        prompt = self._prompts.prompt(question)
        disk_bytes = self._disk_bytes()
        began_s = time.perf_counter()
        self._cached.generate(prompt, budget=self._budget, **_ANSWER)
        ttft_s = time.perf_counter() - began_s
        report = self._cached.last_report
        read = report.reprefill
        if read is None and self._budget in (None, AUTO):
            return self._asked_in_full(report, ttft_s)
        if read is None or read.frames_missing:
            raise StartupError(f"the question was not answered over a part of its prefix: {report.why_not}")
        bytes_read = self._disk_bytes() - disk_bytes
        periods = len(read.sets)
        tokens_per_frame = read.attended_tokens // len(read.sets[0])
        return Asked(
            ttft_s,
            bytes_read + read.summary_bytes,
            read.bytes_needed,
            read.frames_read * tokens_per_frame / periods,
            read.cache_hit_rate,
            read.waited_s + report.timeline.busy_s("lookup"),
            read.reading_s,
            read.summary_bytes,
        )

    @property
    def read(self) -> Pair:
        """What the latest question was answered over."""
        report = self._cached.last_report
        if report.reprefill is not None:
            return report.reprefill.budget, report.reprefill.encoding
        encodings = report.fetch.encodings if report.fetch is not None else ()
        return None, "+".join(sorted(encoding.name for encoding in encodings))

    def forget(self) -> None:
        """Empty the cache of frames."""
        self._client.frame_cache.clear()

    def _asked_in_full(self, report: GenerationReport, ttft_s: float) -> Asked:
        fetched, timeline = report.fetch, report.timeline
        if not isinstance(fetched, FetchReport) or fetched.missing:
            raise StartupError(f"the prefix was not reused in full: {report.why_not}")
        size, waited_s = fetched.received_bytes, timeline.busy_s("wait")
        return Asked(ttft_s, size, size, report.reused_tokens, 0.0, waited_s, timeline.busy_s("receive"))

    def _disk_bytes(self) -> int:
        """Bytes that the nodes' disks have read for frames so far, in whole blocks."""
        return sum(node.stats.counters["frame_disk_bytes"] for node in cluster_stats(self._address).nodes)

    def log_probabilities(self, question: Question) -> torch.Tensor:
        budget = 1.0 if self._budget is None else self._budget
        return self._cached.question_log_probabilities(self._prompts.prompt(question), budget=budget)

    def close(self) -> None:
        self._cached.close()
        self._client.close()


def store_prefix(address: str, model: PreTrainedModel, prompts: Prompts, **settings: Any) -> int:
    """Prefill and store the prefix with its key summaries. Returns its stored bytes. Raises StartupError when it is not
    stored in full."""
    with connect(address, put_timeout_s=600.0, close_timeout_s=600.0, **(PATIENT | settings)) as client:
        cached = CachedModel(model, client)
        client.prepare(cached.spec).result()
        cached.generate(prompts.prefix.unsqueeze(0), budget=1.0, **_ANSWER)
        client.store.flush()
        ids = client.chunk_ids(cached.spec, prompts.prefix.tolist())
        match = client.match(cached.spec, ids)
        client.release(match)
        cached.close()
        if len(match.chunks) < len(ids):
            raise StartupError(f"only {len(match.chunks)} of {len(ids)} chunks of the prefix are stored")
        return sum(chunk.body_bytes for chunk in match.chunks)
