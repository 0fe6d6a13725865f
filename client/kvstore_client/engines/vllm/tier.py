"""The store as a secondary tier of vLLM's own offloading: the engine moves KV to host memory, the tier moves it on."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvstore_client.client import connect
from kvstore_client.engines.vllm.tier_lookups import TierLookups
from kvstore_client.engines.vllm.tier_namespace import page_namespace
from kvstore_client.engines.vllm.tier_versions import OTHER_MACHINES, job_result
from kvstore_client.pages.base import JobId, PageResult

_POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class _Running:
    """A job of the engine that the page store works on."""

    job: TransferJob
    keys: tuple[OffloadKey, ...]
    begun_s: float


class KVStoreTier(SecondaryTierManager):  # type: ignore[misc]  # vLLM has no types here
    """Stores the chunks of the engine's host memory as pages of a `PageStore`, and loads them from there.

    Lives in the scheduler's process. Only `drain_jobs` and `shutdown` wait, until the jobs' deadlines at most. What
    fails is reported to the engine as a failed job, or as a miss, and is computed again.
    """

    medium = Medium.STORAGE
    cache_hit_source = OTHER_MACHINES

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        checkpoint: str | None = None,
        salt: str = "",
        locality: str = Locality.REMOTE.value,
        **settings: Any,
    ) -> None:
        """`primary_kv_view` is the engine's host memory, `[chunks, bytes]`. `checkpoint` is the folder of the model
        that the engine serves; it may be left out where the engine was started with that folder. `salt` separates
        engines that would compute other KV for the same tokens although model and layout are the same. `settings` are
        those of a client, by their flat names.

        Raises UnsupportedEngineError, UnsupportedModelError and ConfigurationError, with the reason.
        """
        given = () if backpressure_detector is None else (backpressure_detector,)  # new in vLLM 0.31
        super().__init__(offloading_spec, primary_kv_view, tier_type, *given)
        self.locality = Locality(locality)
        self._rows = np.asarray(primary_kv_view).view(np.uint8)
        self._page_bytes = self._rows.shape[1]
        self._client = connect(**settings)
        try:
            namespace = page_namespace(
                offloading_spec.config,
                self._page_bytes,
                checkpoint,
                salt,
                self._client.settings.cache_dir,
            )
        except BaseException:
            self._client.close()
            raise
        self._namespace = namespace
        self._page_tokens = offloading_spec.blocks_per_chunk * min(offloading_spec.tokens_per_block)
        self._pages = self._client.pages(namespace, page_tokens=self._page_tokens)
        self._lookups = TierLookups(self._pages, tier_type)
        self._running: dict[JobId, _Running] = {}
        self._ended: list[JobResult] = []

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        keys, views = tuple(job_metadata.keys), self._views(job_metadata)
        self._begun(job_metadata, keys, self._pages.submit_put(keys, views))

    def submit_load(self, job_metadata: TransferJob) -> None:
        keys, views = tuple(job_metadata.keys), self._views(job_metadata)
        self._begun(job_metadata, keys, self._pages.submit_get(keys, views))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._collect()
        ended, self._ended = self._ended, []
        return ended

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._lookups.begin(req_context.req_id)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.finish(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:  # noqa: ARG002
        self._lookups.flush()

    def drain_jobs(self) -> None:
        """The engine calls it when it resets its caches, as before its weights are replaced. From then on the
        checkpoint does not name its KV any more: nothing from before is found again, and what the engine stores has
        names of its own."""
        while self._running:
            self._collect()
            time.sleep(_POLL_S)
        self._pages.close()
        self._collect()
        private = replace(self._namespace, salt=secrets.token_bytes(16))
        self._pages = self._client.pages(private, page_tokens=self._page_tokens)
        self._lookups.use(self._pages)

    def shutdown(self) -> None:
        """Jobs get `close_timeout_s` to finish, then they are ended. Afterwards nothing uses the engine's memory."""
        self._lookups.shutdown()
        self._pages.close()
        self._collect()
        self._client.close()

    def _views(self, job: TransferJob) -> Sequence[memoryview]:
        return [self._rows[int(chunk)].data for chunk in job.chunk_ids]

    def _begun(self, job: TransferJob, keys: tuple[OffloadKey, ...], page_job: JobId) -> None:
        self._running[page_job] = _Running(job, keys, time.monotonic())

    def _collect(self) -> None:
        for page_job, result in self._pages.finished():
            running = self._running.pop(page_job)
            if running.job.is_promotion:
                self._lookups.mark_miss(
                    [key for key, ok in zip(running.keys, result.ok, strict=True) if not ok]
                )
            self._ended.append(self._result(running, result))

    def _result(self, running: _Running, result: PageResult) -> JobResult:
        done = [key for key, ok in zip(running.keys, result.ok, strict=True) if ok]
        success = len(done) == len(running.keys)
        return job_result(
            running.job.job_id,
            success,
            successful_keys=done if done and not success and running.job.is_promotion else None,
            transfer_time=time.monotonic() - running.begun_s,
            transfer_bytes=len(done) * self._page_bytes,
        )
