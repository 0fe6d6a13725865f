"""What people decide about stored chunks takes effect a slice at a time."""

import threading
from collections.abc import Callable, Iterable, Mapping, Set
from itertools import islice

from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.slices import SLICE_CHUNKS, locked_slice
from kvstore_codec.identity import ChunkId


class Directives:
    """Thread-safe: changes one thing at a time, and gives up the lock of the catalog between two slices."""

    def __init__(self, catalog: ChunkCatalog) -> None:
        self._catalog = catalog
        self._turn = threading.Lock()

    def set_pins(self, pins: Set[ChunkId]) -> None:
        """What comes is pinned, or not, at once; what is here already, when this returns."""
        catalog = self._catalog
        with self._turn:
            with catalog.lock:
                before, catalog.pins = catalog.pins, pins
            self._each_variant(before - pins, catalog.pinned.discard)
            self._each_variant(pins - before, catalog.pinned.add)

    def set_quotas(self, limits: Mapping[str, int]) -> None:
        """The limits hold when this returns; until then those before them do."""
        catalog, quotas = self._catalog, self._catalog.quotas
        with self._turn:
            with catalog.lock:
                end = catalog.index.slots if quotas.begin_orders(limits) else 0
            while end:
                with locked_slice(catalog.lock, first=False):
                    begin = max(0, end - SLICE_CHUNKS)
                    quotas.enter_all(begin, end)
                    end = begin
            with catalog.lock:
                quotas.set_limits(limits)

    def _each_variant(self, chunks: Iterable[ChunkId], change: Callable[[int], None]) -> None:
        rest = iter(chunks)
        while some := list(islice(rest, SLICE_CHUNKS)):
            with locked_slice(self._catalog.lock, first=False):
                for chunk_id in some:
                    for slot in self._catalog.index.variants(chunk_id):
                        change(slot)
