"""Administration of a running cluster over gRPC: chunks, pins, quotas, draining and repair."""

from kvstore_service.admin.chunk_names import ChunkPattern
from kvstore_service.admin.cluster import USAGE_COUNTS, ClusterAdmin, NodeAdmin

__all__ = ["USAGE_COUNTS", "ChunkPattern", "ClusterAdmin", "NodeAdmin"]
