"""A fetch: the stages of one match, running beside the engine."""

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
from kvstore_client.lookup import release
from kvstore_client.match import Match
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import Links, Planner
from kvstore_client.settings import ClientSettings
from kvstore_client.threads import single_threaded
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.rope import RotaryTable

log = logging.getLogger(__name__)

_EXPECTED = frozenset({MissReason.CANCELLED, MissReason.GONE})
"""Reasons of missing chunks that are no failures: nobody wants them any more, or they were evicted."""

_JOB_IDS = itertools.count(1)

_PROMPT_S = 0.05
"""An engine that comes later than this had something else to do."""


class Fetch:
    """Brings the chunks of a match into a destination. Never raises and never outlives its deadline.

    The engine calls `wait_layer(0)`, `wait_layer(1)`, ... as it computes, and `finish` at the end, whatever
    happened. An engine that must not wait polls `finished` instead, until it returns a report.

    Threads: one per owner receives, and one looks whether any of them waits in vain; a few take what was received
    through decode, restore and deliver, one range after the other, because keys that were just decoded are still in
    the cache when they are rotated (and on two cores every further busy thread makes the fetch slower). All have ended
    when `finish` returns.
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
        restorer: type[Restorer] = Restorer,
    ) -> None:
        """Without a `planner` every chunk is read in its first variant. Frames that lie wholly inside one of the
        `computed` ranges of positions are not read, and count as delivered. Raises ConfigurationError when a plan is
        asked for, too: it knows of whole chunks only."""
        if computing is not None and computed:
            raise ConfigurationError(
                "a fetch either leaves out what the engine computes (`computed`), or plans what the engine had better "
                "compute (`computing`)"
            )
        self.job_id = next(_JOB_IDS)
        """Names the fetch in this process."""
        self._match = match
        self._view = view
        self._metrics = metrics
        self._timeline = timeline
        self._began_s = timeline.now_s()
        self._finishing = threading.Lock()
        self._finished: FetchReport | None = None
        replanner: Replanner | None = None
        if planner is not None and computing is not None:
            replanner = Replanner(planner, links, computing, timeline, metrics, replan=settings.fetch.replan)
        self._replanner = replanner
        self._progress = FetchState(
            match.chunks,
            layers=destination.layers,
            deadline_s=settings.timeouts.fetch_s,
            stall_s=settings.timeouts.fetch_stall_s,
            timeline=timeline,
            replanner=replanner,
            computed=joined(computed),
        )
        predictions = Predictions(match.chunks, features)
        workers = settings.fetch.decoders
        members = self._progress.members
        received = StageQueue[ReceivedFrames](settings.fetch.inflight_bytes, producers=len(members))
        self._progress.on_end(received.abort)
        replans = replanner is not None and replanner.replan
        self._failover = Failover(view, links, settings, match.chunks, self._progress, replans=replans)
        over = threading.Event()
        self._progress.on_end(over.set)
        receiver = Receiver(view, self._failover, self._progress, received, metrics, ahead=replans)
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
        except RuntimeError:  # no thread left in this process
            self._progress.end(MissReason.NO_RESOURCES)
            for thread in started:
                thread.join()
            raise

    def next_to_compute(self) -> tuple[int, int] | None:
        """The next run of chunks `[first, end)` that the engine is to compute before its last pass, because that is
        sooner than fetching them, or because they are missing. Waits until all before the run is in the buffers, and
        wants the run's keys (rotated) and values there when `computed` is called. None: begin the last pass."""
        return self._progress.next_to_compute()

    def computed(self, first: int, end: int) -> None:
        """The engine has put these chunks into the buffers."""
        self._progress.computed(first, end)

    @property
    def reusable_tokens(self) -> int:
        """Where the last pass begins: all before it is there or will come. To be asked after `next_to_compute`."""
        return self._progress.reusable_tokens

    def wait_layer(self, layer: int) -> bool:
        """Wait until `layer` is in the buffers for every chunk. False when that will not happen: break off, and ask
        `next_to_compute` again."""
        return self._progress.wait_layer(layer)

    def on_ready(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, when the engine would not have to wait for this fetch any more: in any thread, where it
        must not compute (it would hold up the fetch, and with one processor only)."""
        self._progress.on_ready(callback)

    def planned_s(self) -> float:
        """Until the engine's last pass ends, as planned; 0 when there is no plan."""
        return self._progress.planned_s()

    def wait(self) -> FetchReport:
        """Wait until every chunk is delivered or known to be missing, and finish."""
        self._progress.wait()
        return self.finish()

    @property
    def received_bytes(self) -> int:
        """So far."""
        return self._progress.received_bytes

    def cancel(self) -> FetchReport:
        """Stop now. What was not delivered is missing."""
        return self.finish()

    def learn(self, began_s: float, ended_s: float) -> None:
        """The engine's last pass began and ended at these times of the timeline: the next plan knows better. Only what
        came whole, and was not kept waiting by the engine, teaches anything."""
        report, replanner = self.finish(), self._replanner
        if replanner is not None and report.fetched == report.chunks and began_s - self._began_s < _PROMPT_S:
            replanner.learn(report.received_bytes, self._timeline.now_s() - ended_s)

    def finished(self) -> FetchReport | None:
        """How the fetch went, as soon as every chunk is delivered or missing and no thread of the fetch is left; None
        until then. May be called from any thread and as often as wanted; waits for no thread and no network.

        The fetch has then freed everything it held, as after `finish`, which need not be called. Somebody has to ask,
        though: a fetch that nobody polls or finishes keeps its leases until they expire. Chunks that a plan leaves to
        the engine are not waited for, as in `wait`."""
        if self._finished is None and self._progress.is_settled:
            # Nothing is left to be cancelled: this frees threads that wait for more.
            self._progress.end(MissReason.CANCELLED)
            ended = not any(thread.is_alive() for thread in self._threads)
            if ended and self._finishing.acquire(blocking=False):
                try:
                    return self._finished or self._finish()
                finally:
                    self._finishing.release()
        return self._finished

    def finish(self) -> FetchReport:
        """End the fetch, free everything it held and say how it went. Safe to call more than once."""
        with self._finishing:
            return self._finished or self._finish()

    def _finish(self) -> FetchReport:
        self._progress.end(MissReason.CANCELLED)
        for thread in self._threads:
            thread.join()
        release(self._view, (*self._match.leases, *self._failover.leases))
        report = self._finished = self._progress.report()
        self._metrics.received(report.received_bytes)
        self._metrics.delivered(report.fetched)
        self._metrics.planned(fetched=report.chunks - report.computed, computed=report.computed)
        self._metrics.fetched(self._timeline, self._timeline.now_s() - self._began_s)
        for reason, chunks in sorted(Counter(report.missing.values()).items()):
            detail = f"{chunks} of {report.chunks} chunks of a fetch did not come and are computed: {reason}"
            self._metrics.missed(reason, chunks, detail=None if reason in _EXPECTED else detail)
        self._judge_owners(report)
        return report

    def _judge_owners(self, report: FetchReport) -> None:
        """Leave owners alone whose chunks did not come in time: the next prompt shall not wait for them again."""
        late = {
            self._match.chunks[index].member.endpoint
            for index, reason in report.missing.items()
            if reason in (MissReason.TIMEOUT, MissReason.STALLED)
        }
        for endpoint in {member.endpoint for member in self._failover.members()} - self._failover.failed:
            if endpoint in late:
                self._view.pause(endpoint, f"the storage node at {endpoint} did not bring chunks in time")
            elif report.complete:
                self._view.recovered(endpoint)
        if report.missing:
            self._view.refresh()

    def _thread(self, stage: str, target: Callable[..., None], *args: object) -> threading.Thread:
        # Inference mode is a property of a thread, and the engine may have made the buffers under it.
        @single_threaded()
        @torch.inference_mode()
        def run() -> None:
            try:
                target(*args)
            except Exception:
                # A mistake of ours must not leave the engine waiting: the fetch is over, what is missing is computed.
                log.exception("the %s stage of a fetch failed", stage)
                self._progress.end(MissReason.INTERNAL_ERROR)

        return threading.Thread(target=run, name=f"kvstore-{stage}", daemon=True)
