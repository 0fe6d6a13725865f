"""What a storage node counts about itself."""

from dataclasses import asdict, dataclass, field


@dataclass(slots=True)
class NodeCounters:
    """Only ever grow. `hits` are chunks that lookups found and could use, `hit_tokens` their tokens as far as clients
    say, `approximate_hits` those of them that were found in another context than the one asked for, `misses` chunks
    that were not found; `unusable` ones were found and gave nothing, because one before them in their text was not.
    `lookups` counts calls, `reads` frame ranges; `evictions` are chunks that left the node for room, `demotions` those
    that left memory alone, `texts_cut` puts refused because only the beginning of their own text could have made room,
    `disk_refused` puts that the disk did not take, `damaged` copies that the disk lost, `disk_read_errors`
    reads that it failed although it was asked several times, of chunks that stay."""

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

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class NodeStats:
    """`chunks` counts stored variants; `bytes_used` are arena bytes taken, whole blocks. `gauges` are figures of now;
    `disk_error` says why the disk is not used, if it should be."""

    node_id: str
    chunks: int
    bytes_used: int
    bytes_limit: int
    leases: int
    counters: dict[str, int]
    gauges: dict[str, int] = field(default_factory=dict)
    disk_error: str = ""
