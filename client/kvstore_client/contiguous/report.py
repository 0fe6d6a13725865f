"""What a re-prefill read, and what it waited for."""

from collections import Counter
from dataclasses import dataclass, field

from kvstore_client.miss_reason import MissReason


@dataclass(slots=True)
class ReprefillReport:
    """Counts of one re-prefill. Sizes are stored bytes of frames, in their encoding."""

    budget: float = 0.0
    """Share of the prefix's tokens that was asked for, or chosen."""
    prefix_tokens: int = 0
    encoding: str = ""
    """Encoding that the frames were read in."""
    attended_tokens: int = 0
    """Tokens of the prefix in each layer's set."""
    sets: list[list[int]] = field(default_factory=list)
    """Frames that each period attended to, ascending."""
    frames_needed: int = 0
    """Frames of all periods' sets."""
    frames_cached: int = 0
    """Needed frames that were in the frame cache."""
    frames_read: int = 0
    """Frames whose bytes arrived."""
    missing: Counter[MissReason] = field(default_factory=Counter)
    """Needed frames that left the set, by reason: evicted, damaged or too late."""
    bytes_needed: int = 0
    """Size of the needed frames that were not cached."""
    bytes_read: int = 0
    """Size of everything that was read, summaries included."""
    summary_bytes: int = 0
    """Size of the key summaries that were read."""
    waited_s: float = 0.0
    """Time that the engine waited for frames."""
    reading_s: float = 0.0
    """Time during which at least one frame was being read."""

    @property
    def frames_missing(self) -> int:
        """Needed frames that left the set."""
        return self.missing.total()

    @property
    def read_amplification(self) -> float:
        """Bytes read per byte needed; 1 when nothing was needed."""
        return self.bytes_read / self.bytes_needed if self.bytes_needed else 1.0

    @property
    def cache_hit_rate(self) -> float:
        return self.frames_cached / self.frames_needed if self.frames_needed else 0.0
