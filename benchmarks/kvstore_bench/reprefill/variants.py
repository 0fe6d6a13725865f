"""Our system as it is by default, and with one part more or less: what each part is worth."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvstore_codec.encoding import Encoding


@dataclass(frozen=True, slots=True)
class Variant:
    """Which parts of the system are on."""

    frame_tokens: int | None = None
    """Tokens of a frame; None: as many as the benchmark's encoding says."""
    period_layers: int | None = None
    """Layers of a period; None: as many as the benchmark's encoding says. With 1, each layer's set is chosen, requested
    and waited for alone (no intra-period prefetch)."""
    read_ahead: bool = False
    """Whether a period's frames are read while the period before is computed (inter-period prefetch)."""
    caches: bool = True

    def encoding(self, base: str) -> str:
        """The encoding that the prefix is stored in."""
        parsed = Encoding.parse(base)
        return replace(
            parsed,
            frame_tokens=self.frame_tokens or parsed.frame_tokens,
            period_layers=self.period_layers or parsed.period_layers,
        ).name


OURS = {
    "contiguous": Variant(),
    "contiguous-64": Variant(64),
    "contiguous-32": Variant(32),
    "contiguous-16": Variant(16),
    "contiguous-four-layers": Variant(period_layers=4),
    "contiguous-by-layer": Variant(period_layers=1),
    "contiguous-ahead": Variant(read_ahead=True),
    "contiguous-no-cache": Variant(caches=False),
}
"""By name. `contiguous` is what a worker does by default."""
