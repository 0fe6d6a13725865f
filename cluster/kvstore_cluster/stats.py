"""What a storage node counts about itself."""

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class NodeCounters:
    """Only ever grow. `hits` and `misses` count chunks, `lookups` calls, `reads` frame ranges."""

    lookups: int = 0
    hits: int = 0
    misses: int = 0
    puts: int = 0
    put_rejected: int = 0
    reads: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    evictions: int = 0
    deletes: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class NodeStats:
    """`chunks` counts stored variants; `bytes_used` are arena bytes taken, whole blocks."""

    node_id: str
    chunks: int
    bytes_used: int
    bytes_limit: int
    leases: int
    counters: dict[str, int]
