"""Rules for which chunks on disk are also kept in memory."""

# A read of at least this share of a chunk promotes the whole chunk to memory. A smaller range is read alone.
PROMOTE_FROM = 0.5
# Demotion begins above the high watermark and stops at the low one, so that puts find free memory. Shares of memory.
HIGH_WATERMARK, LOW_WATERMARK = 0.95, 0.90


class Residency:
    """The default rules of a node. Experiments replace them."""

    def promotes(self, length: int, size_bytes: int) -> bool:
        """Whether a read of `length` bytes promotes a chunk of `size_bytes` to memory."""
        return length >= PROMOTE_FROM * size_bytes

    def watermarks(self) -> tuple[float, float]:
        """The high and the low watermark of demotion, as shares of memory."""
        return HIGH_WATERMARK, LOW_WATERMARK
