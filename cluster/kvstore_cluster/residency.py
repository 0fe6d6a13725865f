"""Which chunks of the disk are kept in memory, too."""

# A range of at least this part of a chunk brings the whole chunk into memory, a smaller one is read alone.
PROMOTE_FROM = 0.5
# Demotion begins above the high watermark and stops at the low one, so that puts find free memory.
HIGH_WATERMARK, LOW_WATERMARK = 0.95, 0.90


class Residency:
    """The rules of a node; an experiment brings others."""

    def promotes(self, length: int, size_bytes: int) -> bool:
        """Whether a read of `length` bytes brings a chunk of `size_bytes` into memory."""
        return length >= PROMOTE_FROM * size_bytes

    def watermarks(self) -> tuple[float, float]:
        """Shares of memory: demotion begins above the first one and stops at the second."""
        return HIGH_WATERMARK, LOW_WATERMARK
