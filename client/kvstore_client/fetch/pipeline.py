"""A fetch: runs the stages for one match beside the engine."""

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from kvstore_client.cluster_view import ClusterView
from kvstore_client.fetch.base import ReceivedFrames
from kvstore_client.fetch.cut import joined
from kvstore_client.fetch.decode import ChunkFeatures, Predictions
from kvstore_client.fetch.destination import Destination
from kvstore_client.fetch.failover import Failover
from kvstore_client.fetch.fetch_state import FetchState
from kvstore_client.fetch.queue import StageQueue
from kvstore_client.fetch.receive import Receiver
from kvstore_client.fetch.replanner import Computing, Replanner
from kvstore_client.fetch.report import FetchReport
from kvstore_client.fetch.restore import Restorer
from kvstore_client.fetch.summaries import FetchReports
from kvstore_client.lookup import release
from kvstore_client.match import Match
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import Links, Planner
from kvstore_client.request_id import in_request
from kvstore_client.settings import ClientSettings, FetchPolicy
from kvstore_client.threads import single_threaded
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.rope import RotaryTable

log = logging.getLogger(__name__)

_EXPECTED = frozenset({MissReason.CANCELLED, MissReason.GONE, MissReason.OVERTAKEN})
"""Reasons for missing chunks that are not failures: nobody wants them any more, they were evicted, or computing them is
faster."""

_JOB_IDS = itertools.count(1)

_PROMPT_S = 0.05
"""An engine that begins its last pass later than this after the fetch had other work, seconds."""

_SILENT_S = 0.1
"""Nothing came for so long before the engine was found to be faster: so the bandwidth says nothing about the link."""


class Fetch:
    """Fetches the chunks of a match into a destination. Never raises, and ends by its deadline.

    The engine calls `wait_layer(0)`, `wait_layer(1)`, ... as it computes, and always `finish` at the end. An engine
    that must not block polls `finished` instead, until it returns a report.

    Threads: one per owner receives, and one watches for stalled streams. A few more take the received frames through
    decode, restore and deliver, one range after the other, because freshly decoded keys are still in the cache when
    they are rotated (and on two cores every further busy thread slows the fetch down). All threads have ended when
    `finish` returns.
    """

    def __init__(
        self,
        match: Match,
        destination: Destination,
        rotary: tuple[RotaryTable, ...] | None,
        features: ChunkFeatures | None,
        *,
        view: ClusterView,
        links: Links,
        settings: ClientSettings,
        metrics: ClientMetrics,
        timeline: Timeline,
        planner: Planner | None = None,
        computing: Computing | None = None,
        computed: Sequence[range] = (),
        windows: Sequence[int | None] = (),
        restorer: type[Restorer] = Restorer,
        on_finish: Callable[[], object] | None = None,
        fetch_reports: FetchReports | None = None,
    ) -> None:
        """Without a `planner` every chunk is read in its first variant. Frames entirely inside one of the `computed`
        ranges of positions, or outside the `windows` of all computed tokens, are not read, and count as delivered.
        `on_finish` is called once, at the end. Raises ConfigurationError for `computed` together with a plan, which
        covers only whole chunks."""
        if computing is not None and computed:
            raise ConfigurationError(
                "a fetch either skips positions that the engine computes (`computed`), "
                "or plans what the engine computes (`computing`)"
            )
        self.job_id = next(_JOB_IDS)
        """Unique id of the fetch in this process."""
        self._match = match
        self._view = view
        self._metrics = metrics
        self._on_finish = on_finish
        self._fetch_reports = fetch_reports or FetchReports(view)
        self._timeline = timeline
        self._began_s = timeline.now_s()
        self._finishing = threading.Lock()
        self._finished: FetchReport | None = None
        replanner: Replanner | None = None
        if planner is not None and computing is not None:
            replan = settings.fetch.replan and settings.fetch.policy is not FetchPolicy.FIXED
            replanner = Replanner(planner, links, computing, timeline, metrics, replan=replan)
        self._replanner = replanner
        self._waits = computing is not None and computing.waits
        self._fetch_state = FetchState(
            match.chunks,
            layers=destination.layers,
            deadline_s=settings.timeouts.fetch_s,
            stall_s=settings.timeouts.fetch_stall_s,
            timeline=timeline,
            replanner=replanner,
            computed=joined(computed),
            windows=windows,
        )
        predictions = Predictions(match.chunks, features)
        workers = settings.fetch.decoders
        members = self._fetch_state.members
        received = StageQueue[ReceivedFrames](settings.fetch.inflight_bytes, producers=len(members))
        self._fetch_state.on_end(received.abort)
        replans = replanner is not None and replanner.replan
        self._failover = Failover(view, links, settings, match.chunks, self._fetch_state, replans=replans)
        over = threading.Event()
        self._fetch_state.on_end(over.set)
        receiver = Receiver(view, self._failover, self._fetch_state, received, metrics, ahead=replans)
        restoring = restorer(
            receiver, destination, rotary, predictions, computing.costs if computing else None
        )
        self._threads = [
            *(self._thread("receive", receiver.receive, member) for member in members),
            self._thread("watch", self._failover.watch, over),
            *(self._thread("restore", restoring.run) for _ in range(workers)),
        ]
        started: list[threading.Thread] = []
        try:
            for thread in self._threads:
                thread.start()
                started.append(thread)
        except RuntimeError:  # this process has no thread left
            self._fetch_state.end(MissReason.NO_RESOURCES)
            for thread in started:
                thread.join()
            raise

    def next_to_compute(self) -> tuple[int, int] | None:
        """The next run of chunks `[first, end)` for the engine to compute before its last pass, because computing them
        is faster than fetching or because they are missing. Blocks until all chunks before the run are in the
        destination. The engine writes the run's keys (rotated) and values there and then calls `computed`. None: begin
        the last pass."""
        return self._fetch_state.next_to_compute()

    def computed(self, first: int, end: int) -> None:
        """Report that the engine has written the KV of these chunks to the destination."""
        self._fetch_state.computed(first, end)

    @property
    def reusable_tokens(self) -> int:
        """Position at which the last pass begins: all chunks before it are delivered or will be. Ask after
        `next_to_compute`."""
        return self._fetch_state.reusable_tokens

    def wait_layer(self, layer: int) -> bool:
        """Block until `layer` of every chunk is in the destination. False when that will not happen: abort the pass,
        and call `next_to_compute` again."""
        return self._fetch_state.wait_layer(layer)

    def on_ready(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, when the engine would no longer wait for this fetch. Any thread may run it; it must not
        compute, which would delay the fetch, on a single thread."""
        self._fetch_state.on_ready(callback)

    def planned_s(self) -> float:
        """Planned seconds until the engine's last pass ends; 0 without a plan."""
        return self._fetch_state.planned_s()

    def wait(self) -> FetchReport:
        """Block until every chunk is delivered or known to be missing, and finish."""
        self._fetch_state.wait()
        return self.finish()

    @property
    def received_bytes(self) -> int:
        """Bytes received so far."""
        return self._fetch_state.received_bytes

    def cancel(self) -> FetchReport:
        """Stop now. Chunks that were not delivered are missing."""
        return self.finish()

    def learn(self, began_s: float, ended_s: float) -> None:
        """Improve later plans with the times at which the engine's last pass began and ended, in seconds of the
        timeline. Only a fetch that is complete, and that the engine did not delay, counts."""
        report, replanner = self.finish(), self._replanner
        if replanner is not None and report.fetched == report.chunks and began_s - self._began_s < _PROMPT_S:
            replanner.learn(report.received_bytes, self._timeline.now_s() - ended_s)

    def finished(self) -> FetchReport | None:
        """The fetch's report as soon as every chunk is delivered or missing and all its threads have ended; None until
        then. Any thread may call it, repeatedly; it waits for no thread and no network.

        Once it returns a report, all resources are released, as after `finish`, which need not be called. Somebody must
        ask: a fetch that is neither polled nor finished keeps its leases until they expire. As in `wait`, chunks that a
        plan leaves to the engine are not waited for.
        """
        if self._finished is None and self._fetch_state.is_settled:
            # No chunk is left to cancel: this frees threads that wait for more.
            self._fetch_state.end(MissReason.CANCELLED)
            ended = not any(thread.is_alive() for thread in self._threads)
            if ended and self._finishing.acquire(blocking=False):
                try:
                    return self._finished or self._finish()
                finally:
                    self._finishing.release()
        return self._finished

    def finish(self) -> FetchReport:
        """End the fetch, release its resources and return its report. May be called repeatedly."""
        with self._finishing:
            return self._finished or self._finish()

    def _finish(self) -> FetchReport:
        self._fetch_state.end(MissReason.CANCELLED)
        for thread in self._threads:
            thread.join()
        release(self._view, (*self._match.leases, *self._failover.leases))
        replanner, silent_s = self._replanner, self._fetch_state.silent_s
        report = self._finished = self._fetch_state.report()
        self._metrics.received(report.received_bytes)
        self._metrics.fetched_bytes(report.bytes_by_encoding)
        self._metrics.delivered(report.fetched)
        self._metrics.planned(fetched=report.chunks - report.computed, computed=report.computed)
        took_s = self._timeline.now_s() - self._began_s
        self._metrics.fetched(self._timeline, took_s)
        if replanner is not None and replanner.predicted_fetch_s is not None:
            self._metrics.predicted(replanner.predicted_fetch_s, took_s)
        if replanner is not None and self._waits and report.complete and report.fetched:
            replanner.learn(report.received_bytes, silent_s)
        for reason, chunks in sorted(Counter(report.missing.values()).items()):
            detail = (
                f"{chunks} of {report.chunks} chunks of a fetch did not arrive and are computed: {reason}"
            )
            self._metrics.missed(reason, chunks, detail=None if reason in _EXPECTED else detail)
        self._judge_owners(report)
        if self._on_finish is not None:
            self._on_finish()
        predicted_s = None if replanner is None else replanner.predicted_fetch_s
        self._fetch_reports.add(report, self._timeline, took_s, predicted_s)
        log.debug(
            "a fetch of %d chunks delivered %d in %.3f s: %d bytes, %d chunks were left to the engine",
            report.chunks,
            report.fetched,
            took_s,
            report.received_bytes,
            report.computed,
        )
        return report

    def _judge_owners(self, report: FetchReport) -> None:
        """Pause owners whose chunks did not arrive in time, so that the next prompt does not wait for them again."""
        late_reasons = {MissReason.TIMEOUT, MissReason.STALLED}
        if self._fetch_state.silence_s >= _SILENT_S:  # otherwise the link is known to be slow
            late_reasons.add(MissReason.OVERTAKEN)
        late = {
            self._match.chunks[index].member.endpoint
            for index, reason in report.missing.items()
            if reason in late_reasons
        }
        for endpoint in {member.endpoint for member in self._failover.members()} - self._failover.failed:
            if endpoint in late:
                self._view.pause(endpoint, f"the storage node at {endpoint} did not send chunks in time")
            elif report.complete:
                self._view.recovered(endpoint)
        if report.missing:
            self._view.refresh()

    def _thread(self, stage: str, target: Callable[..., None], *args: object) -> threading.Thread:
        # Inference mode is set per thread, and the engine may have allocated the buffers under it.
        @single_threaded()
        @torch.inference_mode()
        def run() -> None:
            try:
                target(*args)
            except Exception:
                # A bug in a stage must not leave the engine waiting: the fetch ends, and missing chunks are computed.
                log.exception("the %s stage of a fetch failed", stage)
                self._fetch_state.end(MissReason.INTERNAL_ERROR)

        return threading.Thread(target=in_request(run), name=f"kvstore-{stage}", daemon=True)
