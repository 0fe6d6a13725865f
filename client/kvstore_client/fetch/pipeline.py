"""A fetch: the stages of one prefix, running beside the engine."""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.cluster_view import ClusterView
from kvstore_client.fetch.base import Destination, ReceivedFrames
from kvstore_client.fetch.decode import ChunkFeatures, Predictions, decode
from kvstore_client.fetch.deliver import Delivery, FetchReport
from kvstore_client.fetch.failover import Failover
from kvstore_client.fetch.plan import plan_reads
from kvstore_client.fetch.queue import StageQueue
from kvstore_client.fetch.receive import Receiver
from kvstore_client.fetch.restore import restore
from kvstore_client.lookup import PrefixMatch, release
from kvstore_client.metrics import ClientMetrics
from kvstore_client.settings import ClientSettings
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import CalibrationError, ChecksumError, CodecError
from kvstore_codec.rope import RotaryTable

log = logging.getLogger(__name__)


class Fetch:
    """Brings the chunks of a match into buffers. Never raises and never outlives its deadline.

    The engine calls `wait_layer(0)`, `wait_layer(1)`, ... as it computes, and `finish` at the end, whatever
    happened. Threads: one per owner receives, and one looks whether any of them waits in vain; a few take what was
    received through decode, restore and deliver, one range after the other, because keys that were just decoded are
    still in the cache when they are rotated (and on two cores every further busy thread makes the fetch slower). All
    have ended when `finish` returns.
    """

    def __init__(
        self,
        match: PrefixMatch,
        buffers: KVBuffers,
        rotary: tuple[RotaryTable, ...] | None,
        features: ChunkFeatures | None,
        *,
        view: ClusterView,
        settings: ClientSettings,
        metrics: ClientMetrics,
        timeline: Timeline,
    ) -> None:
        self._match = match
        self._view = view
        self._metrics = metrics
        self._finished: FetchReport | None = None
        reads = plan_reads(match.chunks)
        self._delivery = Delivery(
            (task for tasks in reads.values() for task in tasks),
            layers=buffers.keys.shape[0],
            deadline_s=settings.fetch_timeout_s,
            stall_s=settings.stall_timeout_s,
            timeline=timeline,
        )
        destination = Destination(buffers, rotary)
        predictions = Predictions(match.chunks, features)
        # Measured on 2 cores: a second decoder takes more from the engine than it gives (first token 15 % later).
        workers = settings.decode_threads or min(4, max(1, (os.cpu_count() or 1) // 2))
        received = StageQueue[ReceivedFrames](settings.inflight_bytes, producers=len(reads))
        self._delivery.on_end(received.abort)
        self._failover = Failover(view, settings, match.chunks, self._delivery)
        over = threading.Event()
        self._delivery.on_end(over.set)
        receiver = Receiver(view, self._failover, self._delivery, received, metrics)
        self._threads = [
            *(self._thread("receive", receiver.receive, member, tasks) for member, tasks in reads.items()),
            self._thread("watch", self._failover.watch, over),
            *(
                self._thread("restore", _restore_received, receiver, destination, predictions)
                for _ in range(workers)
            ),
        ]
        started: list[threading.Thread] = []
        try:
            for thread in self._threads:
                thread.start()
                started.append(thread)
        except RuntimeError:  # no thread left in this process
            self._delivery.end("no_resources")
            for thread in started:
                thread.join()
            raise

    def wait_layer(self, layer: int) -> bool:
        """Wait until `layer` is in the buffers for every chunk. False when that will not happen: stop reusing."""
        return self._delivery.wait_layer(layer)

    def wait(self) -> FetchReport:
        """Wait until every chunk is delivered or known to be missing, and finish."""
        self._delivery.wait()
        return self.finish()

    def cancel(self) -> FetchReport:
        """Stop now. What was not delivered is missing."""
        return self.finish()

    def finish(self) -> FetchReport:
        """End the fetch, free everything it held and say how it went. Safe to call more than once."""
        if self._finished is not None:
            return self._finished
        self._delivery.end("cancelled")
        for thread in self._threads:
            thread.join()
        release(self._view, (*self._match.leases, *self._failover.leases))
        encodings = frozenset(chunk.header.encoding for chunk in self._match.chunks)
        report = self._finished = replace(self._delivery.report(), encodings=encodings)
        self._metrics.received(report.received_bytes)
        self._metrics.delivered(report.delivered)
        for reason in sorted(set(report.missing.values())):
            self._metrics.missed(reason, sum(1 for r in report.missing.values() if r == reason))
        self._judge_owners(report)
        return report

    def _judge_owners(self, report: FetchReport) -> None:
        """Leave owners alone whose chunks did not come in time: the next prompt shall not wait for them again."""
        late = {
            self._match.chunks[index].member.endpoint
            for index, reason in report.missing.items()
            if reason in ("timeout", "stalled")
        }
        for endpoint in {member.endpoint for member in self._failover.members()} - self._failover.failed:
            if endpoint in late:
                self._view.pause(endpoint)
            elif report.complete:
                self._view.recovered(endpoint)
        if report.missing:
            self._view.refresh()

    def _thread(self, stage: str, target: Callable[..., None], *args: object) -> threading.Thread:
        # Inference mode is a property of a thread, and the engine may have made the buffers under it.
        @torch.inference_mode()
        def run() -> None:
            try:
                target(*args)
            except Exception:
                # A mistake of ours must not leave the engine waiting: the fetch is over, what is missing is computed.
                log.exception("the %s stage of a fetch failed", stage)
                self._delivery.end("internal_error")

        return threading.Thread(target=run, name=f"kvstore-{stage}", daemon=True)


def _restore_received(receiver: Receiver, destination: Destination, predictions: Predictions) -> None:
    """Decode, restore and deliver until nothing more is received. A frame that is bad wherever it is read makes its
    chunk missing."""
    delivery = receiver.delivery
    for received in receiver.out:
        item: ReceivedFrames | None = received
        task, reason = received.task, ""
        while item is not None:
            try:
                with delivery.timeline.span("decode", task.label):
                    decode(item, destination, predictions)
                break
            except CodecError as error:
                reason = _reason(error)
                # Bytes that are not what the header says may be so elsewhere, where the same header is.
                item = receiver.read_again(task) if reason == "checksum" else None
                if item is not None:
                    receiver.metrics.failed_over(reason)
        if item is None:
            delivery.fail_chunks([task], reason)
            continue
        with delivery.timeline.span("restore", task.label):
            restore(task, destination)
        delivery.deliver(task)


def _reason(error: CodecError) -> str:
    if isinstance(error, ChecksumError):
        return "checksum"
    return "calibration" if isinstance(error, CalibrationError) else "undecodable"
