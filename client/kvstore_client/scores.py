"""What a model attended to, told to the nodes that decide what to keep."""

from collections.abc import Mapping

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.replicas import chunk_ref
from kvstore_codec.identity import ChunkId

_TIMEOUT_S = 5.0


def report_scores(view: ClusterView, scores: Mapping[ChunkId, float]) -> None:
    """Starts telling every owner. Raises NodeUnavailableError when there is no node."""
    requests: dict[Member, pb.ReportRequest] = {}
    placed = view.writers([chunk_id.content_id for chunk_id in scores])
    for (chunk_id, score), owners in zip(scores.items(), placed, strict=True):
        for owner in owners:
            request = requests.setdefault(owner, pb.ReportRequest())
            request.chunks.append(chunk_ref(chunk_id))
            request.scores.append(score)
    for owner, request in requests.items():
        view.finish_later(view.storage(owner.endpoint).Report.future(request, timeout=_TIMEOUT_S))
