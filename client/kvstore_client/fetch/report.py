"""Report of a fetch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore_client.miss_reason import MissReason
from kvstore_codec.encoding import Encoding


@dataclass(frozen=True, slots=True)
class FetchReport:
    """Result of a fetch."""

    chunks: int
    delivered: int
    """Number of leading chunks that are complete in every layer and may be reused as a prefix."""
    missing: Mapping[int, MissReason] = field(default_factory=dict)
    """Reason for each missing chunk, by chunk index."""
    received_bytes: int = 0
    bytes_by_encoding: Mapping[Encoding, int] = field(default_factory=dict)
    """Bytes that arrived and were decoded, by the encoding of their chunk."""
    fetched: int = 0
    """Number of chunks that arrived, with all KV that the engine needs of them."""
    computed: int = 0
    """Number of chunks that the engine computes because that is faster, or because a missing chunk behind them needs
    windows of theirs that were not read."""
    replans: int = 0

    @property
    def encodings(self) -> frozenset[Encoding]:
        """Encodings in which chunks arrived."""
        return frozenset(self.bytes_by_encoding)

    @property
    def complete(self) -> bool:
        return not self.missing and self.fetched + self.computed == self.chunks
