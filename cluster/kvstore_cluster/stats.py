"""Counters and statistics of a storage node."""

from dataclasses import asdict, dataclass, field

from kvstore_cluster.tallies import Sample


@dataclass(slots=True)
class NodeCounters:
    """Counters that only grow. Of lookups: `lookups` counts calls, `hits` chunks that were found and usable,
    `hit_tokens` the tokens of hits as reported by clients, `approximate_hits` hits in another context than the
    requested one, `misses` chunks that were not found, and `unusable` chunks that were found behind a missing chunk
    of their text. `reads` counts frame ranges. `evictions` counts chunks removed from the node to free space,
    `demotions` chunks removed only from memory. `texts_cut` counts puts refused because only the beginning of their
    own text could be evicted, `disk_refused` puts that the disk refused, `damaged` copies that the disk lost, and
    `disk_read_errors` reads that failed in every attempt and whose chunk stays on disk. Of reads of single frames:
    `frame_disk_reads` counts reads from disk, which may cover several ranges, `frame_disk_bytes` the bytes of their
    blocks, and `ranges_dropped` ranges that clients cancelled."""

    lookups: int = 0
    hits: int = 0
    approximate_hits: int = 0
    hit_tokens: int = 0
    unusable: int = 0
    misses: int = 0
    puts: int = 0
    put_rejected: int = 0
    reads: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    evictions: int = 0
    texts_cut: int = 0
    deletes: int = 0
    expired: int = 0
    promotions: int = 0
    demotions: int = 0
    disk_refused: int = 0
    damaged: int = 0
    disk_read_errors: int = 0
    frame_disk_reads: int = 0
    frame_disk_bytes: int = 0
    ranges_dropped: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class NodeStats:
    """Statistics of a storage node. `chunks` counts stored variants, `bytes_used` the bytes of allocated arena blocks.
    `gauges` are current values, and `samples` those with labels. `disk_error` is the
    reason why a configured disk is not used, or empty."""

    node_id: str
    chunks: int
    bytes_used: int
    bytes_limit: int
    leases: int
    counters: dict[str, int]
    gauges: dict[str, int] = field(default_factory=dict)
    disk_error: str = ""
    samples: tuple[Sample, ...] = ()
