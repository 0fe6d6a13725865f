"""Applies pins and quotas of operators to the stored chunks, one slice at a time."""

import threading
from collections.abc import Callable, Iterable, Mapping, Set
from itertools import islice

from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.slices import SLICE_CHUNKS, locked_slice
from kvstore_codec.identity import ChunkId


class Directives:
    """Thread-safe. Applies one change at a time, and releases the lock of the catalog between slices of chunks. Every
    method: lock not held; may block."""

    def __init__(self, catalog: ChunkCatalog) -> None:
        self._catalog = catalog
        self._turn = threading.Lock()

    def set_pins(self, pins: Mapping[str, Set[ChunkId]]) -> None:
        """Replaces the sets of pinned chunks, by namespace. New chunks follow the new sets at once, stored chunks when
        this returns."""
        catalog = self._catalog
        with self._turn:
            with catalog.lock:
                if not catalog.index.isolated:
                    pins = {"": pins.get("", frozenset())}
                before, catalog.pins = catalog.pins, pins
            for namespace in before.keys() | pins.keys():
                old, new = before.get(namespace, frozenset()), pins.get(namespace, frozenset())
                self._each_variant(namespace, old - new, catalog.pinned.discard)
                self._each_variant(namespace, new - old, catalog.pinned.add)

    def set_quotas(self, limits: Mapping[str, int]) -> None:
        """Replaces the quotas, in bytes by tenant. The previous quotas hold until this returns."""
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

    def _each_variant(self, namespace: str, chunks: Iterable[ChunkId], change: Callable[[int], None]) -> None:
        rest = iter(chunks)
        while some := list(islice(rest, SLICE_CHUNKS)):
            with locked_slice(self._catalog.lock, first=False):
                for chunk_id in some:
                    for slot in self._catalog.index.variants(chunk_id, namespace):
                        change(slot)
