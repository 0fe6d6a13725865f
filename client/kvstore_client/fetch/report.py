"""What a fetch leaves to be known of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore_client.miss_reason import MissReason
from kvstore_codec.encoding import Encoding


@dataclass(frozen=True, slots=True)
class FetchReport:
    """How a fetch ended."""

    chunks: int
    delivered: int
    """Leading chunks that are complete in every layer: what may be reused as a prefix."""
    missing: Mapping[int, MissReason] = field(default_factory=dict)
    """Chunk index -> reason."""
    received_bytes: int = 0
    encodings: frozenset[Encoding] = frozenset()
    """What the chunks came in."""
    fetched: int = 0
    """Chunks that came whole."""
    computed: int = 0
    """Chunks that the engine computes because that is sooner."""
    replans: int = 0

    @property
    def complete(self) -> bool:
        return not self.missing and self.fetched + self.computed == self.chunks
