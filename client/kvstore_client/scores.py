"""Reports to the nodes how much attention models paid to chunks: nodes that evict by value keep those longer."""

import math
import threading
from collections.abc import Mapping
from heapq import nlargest

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_codec.identity import ChunkId

MOST_CHUNKS = 4096
"""Chunks of one report, those with the highest scores: a prompt of a million tokens."""
_TIMEOUT_S = 5.0
_MOST_CALLS = 32


class ScoreReports:
    """Sends reports in the background. Thread-safe. A report that no node takes is lost: the scores of later prompts
    replace it."""

    def __init__(self, view: ClusterView, tenant: str) -> None:
        """Nodes apply scores only to chunks that `tenant` stored."""
        self._view, self._tenant = view, tenant
        self._lock = threading.Lock()
        self._calls = 0

    def send(self, scores: Mapping[ChunkId, float]) -> bool:
        """Start to report each chunk's share of the attention, 0 to 1, to the chunk's owners, without waiting. Scores
        outside these bounds count as the nearest one, and those that are no numbers are left out. Returns False, and
        sends nothing, while too many calls wait for their answers. Raises NodeUnavailableError when the cluster has no
        node."""
        with self._lock:
            if self._calls >= _MOST_CALLS:
                return False
        known = {chunk_id: score for chunk_id, score in scores.items() if not math.isnan(score)}
        kept = nlargest(MOST_CHUNKS, known, key=known.__getitem__)
        requests: dict[Member, pb.ReportRequest] = {}
        placed = self._view.writers([chunk_id.content_id for chunk_id in kept])
        for chunk_id, owners in zip(kept, placed, strict=True):
            for owner in owners:
                request = requests.setdefault(owner, pb.ReportRequest(tenant=self._tenant))
                request.chunks.append(chunk_ref(chunk_id))
                request.scores.append(min(max(known[chunk_id], 0.0), 1.0))
        for owner, request in requests.items():
            call = self._view.storage(owner.endpoint).Report.future(request, timeout=_TIMEOUT_S)
            with self._lock:
                self._calls += 1
            call.add_done_callback(self._ended)
            self._view.finish_later(call)
        return True

    def _ended(self, _: object = None) -> None:
        with self._lock:
            self._calls -= 1
