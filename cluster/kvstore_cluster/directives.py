"""What people decide about stored chunks takes effect a slice at a time."""

import threading
from collections.abc import Callable, Iterable, Mapping, Set
from itertools import islice

from kvstore_cluster.slices import SLICE_CHUNKS, locked_slice
from kvstore_cluster.tiers import Tiers
from kvstore_codec.identity import ChunkId


class Directives:
    """Thread-safe: changes one thing at a time, and lets go of the lock of `tiers` between two slices."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._turn = threading.Lock()

    def set_pins(self, pins: Set[ChunkId]) -> None:
        """What comes is pinned, or not, at once; what is here already, when this returns."""
        tiers = self._tiers
        with self._turn:
            with tiers.lock:
                before, tiers.pins = tiers.pins, pins
            self._each_variant(before - pins, tiers.pinned.discard)
            self._each_variant(pins - before, tiers.pinned.add)

    def set_quotas(self, limits: Mapping[str, int]) -> None:
        """The limits hold when this returns; until then those before them do."""
        tiers, quotas = self._tiers, self._tiers.quotas
        with self._turn:
            with tiers.lock:
                end = tiers.index.slots if quotas.begin_orders(limits) else 0
            while end:
                with locked_slice(tiers.lock, first=False):
                    begin = max(0, end - SLICE_CHUNKS)
                    quotas.enter_all(begin, end)
                    end = begin
            with tiers.lock:
                quotas.set_limits(limits)

    def _each_variant(self, chunks: Iterable[ChunkId], change: Callable[[int], None]) -> None:
        rest = iter(chunks)
        while some := list(islice(rest, SLICE_CHUNKS)):
            with locked_slice(self._tiers.lock, first=False):
                for chunk_id in some:
                    for slot in self._tiers.index.variants(chunk_id):
                        change(slot)
