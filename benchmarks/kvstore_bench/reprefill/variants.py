"""Our system as it is by default, and with one part more or less: what each part is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from kvstore_codec import geometry
from kvstore_codec.encoding import Encoding


@dataclass(frozen=True, slots=True)
class Variant:
    """Which parts of the system are on."""

    frame_tokens: int | None = None
    """Tokens of a frame; None: as many as the benchmark's encoding says."""
    read_ahead: bool = False
    """Whether a period's frames are read while the period before is computed (inter-period prefetch)."""
    caches: bool = True
    by_layer: bool = False
    """Whether every layer is a period: its set is chosen, requested and waited for alone (no intra-period prefetch)."""

    @property
    def salt(self) -> str:
        """Tenant salt of the client. Chunks of other periods have the same encoding, but need other names."""
        return "by layer" if self.by_layer else ""

    @contextmanager
    def stored(self) -> Iterator[None]:
        """In this context chunks are encoded with the variant's periods."""
        usual = geometry.PERIOD_LAYERS
        geometry.PERIOD_LAYERS = 1 if self.by_layer else usual
        try:
            yield
        finally:
            geometry.PERIOD_LAYERS = usual

    def encoding(self, base: str) -> str:
        """The encoding that the prefix is stored in."""
        if self.frame_tokens is None:
            return base
        return replace(Encoding.parse(base), frame_tokens=self.frame_tokens).name


OURS = {
    "contiguous": Variant(),
    "contiguous-64": Variant(64),
    "contiguous-32": Variant(32),
    "contiguous-16": Variant(16),
    "contiguous-by-layer": Variant(by_layer=True),
    "contiguous-ahead": Variant(read_ahead=True),
    "contiguous-no-cache": Variant(caches=False),
}
"""By name. `contiguous` is what a worker does by default."""
