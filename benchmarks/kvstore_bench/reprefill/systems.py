"""What is measured of a system that answers a question."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Asked:
    """One question answered up to its first token."""

    ttft_s: float
    """From the call to the first token, lookup, scoring and reading included."""
    bytes_read: int = 0
    bytes_needed: int = 0
    """Bytes of the KV that the question attends to and that was not cached."""
    tokens_read: float = 0
    """Prefix tokens whose KV was read, averaged over layers."""
    cache_hit_rate: float = 0.0
    waited_s: float = 0.0
    """Time in which the model waited for bytes, or for the lookup that tells where they are."""
    reading_s: float = 0.0
    """Time in which bytes were being read."""
    summary_bytes: int = 0
    """Part of `bytes_read` that a process reads once for a prefix, whatever is asked: key summaries."""
