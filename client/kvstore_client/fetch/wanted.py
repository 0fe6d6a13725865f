"""Which frames of a chunk are read: not those whose tokens the engine computes, and in layers with a sliding window
only those that the window of a computed token reaches."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore_client.fetch.cut import joined, slots_outside
from kvstore_client.match import StoredChunk, Variant


@dataclass(frozen=True, slots=True)
class WantedFrames:
    """The frames of one chunk that are read. A frame is read whole, or not at all."""

    chunk: StoredChunk
    computed: Sequence[range] = ()
    """Positions that the engine computes in any case, `joined`."""
    windows: Sequence[int | None] = ()
    """Sliding window of each layer, tokens (None: full attention); empty if no layer has one."""
    computed_from: int = 0
    """Position of the first token behind the chunk that the engine computes. Only matters with `windows`."""

    @property
    def has_windows(self) -> bool:
        """Whether any layer has a sliding window."""
        return any(window is not None for window in self.windows)

    def slots(self, variant: Variant, layers: range) -> Sequence[int]:
        """Slots of a variant that are read for a period, which has these layers."""
        geometry = variant.header.geometry
        skipped = self.computed
        begin = self._first_position(layers)
        if begin > self.chunk.first_token:
            if begin >= self.chunk.first_token + geometry.tokens:
                return ()
            skipped = joined([*skipped, range(begin)])
        if not skipped:
            return range(geometry.frames_per_period)
        return slots_outside(self.chunk, variant, skipped)

    def added(self, before: "WantedFrames", variant: Variant, layers: range) -> Sequence[int]:
        """Slots that are read now, and were not `before`."""
        now, then = self.slots(variant, layers), before.slots(variant, layers)
        return () if len(now) == len(then) else [slot for slot in now if slot not in then]

    def _first_position(self, layers: range) -> int:
        """Position before which no computed token looks, in any of these layers.

        The first computed token attends to itself and to the `window - 1` tokens before it. One more is kept, because
        an engine computes the last token again when a prompt ends where its stored chunks do.
        """
        if not self.windows:
            return 0
        reach = self.windows[layers.start : layers.stop]
        return max(0, min(0 if window is None else self.computed_from - window for window in reach))
