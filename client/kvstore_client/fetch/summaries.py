"""Tells the coordinator how the stages of a fetch went, for the cluster's status page."""

import os
import socket
import threading
import time

import grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.fetch.report import FetchReport
from kvstore_client.spans import STAGES
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import NodeUnavailableError

PERIOD_S = 5.0
"""At most one fetch of a client is reported in this time. A sample is enough for people to look at."""
MOST_SPANS = 64
_SPANS_OF_STAGE = MOST_SPANS // len(STAGES)
_TIMEOUT_S = 5.0


class FetchReports:
    """Sends reports in the background. Thread-safe. A report that does not arrive is lost."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view
        self._lock = threading.Lock()
        self._due_s = 0.0

    def add(self, report: FetchReport, timeline: Timeline, took_s: float, predicted_s: float | None) -> None:
        """Report a finished fetch, unless another one was reported a moment ago. Waits for nothing."""
        now_s = time.monotonic()
        with self._lock:
            if now_s < self._due_s:
                return
            self._due_s = now_s + PERIOD_S
        fetch = pb.FetchSummary(
            request_id=timeline.request_id,
            worker=f"{socket.gethostname()[:100]} ({os.getpid()})",
            took_s=took_s,
            predicted_s=predicted_s or 0.0,
            chunks=report.chunks,
            delivered=report.fetched,
            computed=report.computed,
            size_bytes=report.received_bytes,
            spans=[
                pb.StageSpan(stage=stage, start_s=start_s, end_s=end_s)
                for stage in STAGES
                for start_s, end_s in timeline.busy(stage)[:_SPANS_OF_STAGE]
            ],
        )
        try:
            request = pb.ReportFetchRequest(fetch=fetch, tenant=self._view.tenant)
            call = self._view.coordinator().ReportFetch.future(request, timeout=_TIMEOUT_S)
        except (NodeUnavailableError, grpc.RpcError, RuntimeError):
            return  # the client was closed, or the process has no thread left
        self._view.finish_later(call)
