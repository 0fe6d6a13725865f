"""The disk tier: a crash-safe store of chunks in append-only segments.

`store` is the interface for a storage node. It appends records to a `log` of segments (`record`, `segment`,
`segment_format`, `file`, `commit`), each of which lies plainly or encrypted in its file (`layouts`, `layout`,
`encrypted_layout`). `recovery` rebuilds the store after a restart (`scan`, `census`), `compaction`
frees space, and `upkeep` syncs periodically.
"""

from kvstore_cluster.disk.location import Location
from kvstore_cluster.disk.record import RecordMeta
from kvstore_cluster.disk.recovery import Recovery
from kvstore_cluster.disk.store import SegmentStore

__all__ = ["Location", "RecordMeta", "Recovery", "SegmentStore"]
