"""The disk tier: a crash-safe store of chunks in append-only segments.

`store` is what a storage node uses. Under it, a `log` of segments takes records (`record`, `segment`, `segment_format`,
`file`, `commit`), `recovery` opens it after a crash (`scan`, `census`), `compaction` frees space, `upkeep` syncs.
"""

from kvstore_cluster.disk.location import Location
from kvstore_cluster.disk.record import RecordMeta, record_bytes
from kvstore_cluster.disk.recovery import Recovery
from kvstore_cluster.disk.store import SegmentStore

__all__ = ["Location", "RecordMeta", "Recovery", "SegmentStore", "record_bytes"]
