"""Where key summaries are kept: in this process, and beside the chunks on the storage nodes for all workers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvstore_client.contiguous.prefix_keys import PrefixKeys
from kvstore_client.contiguous.summaries import ChunkSummary, SummaryShape
from kvstore_client.pages import PageStore
from kvstore_codec.errors import InvalidKVError
from kvstore_codec.identity import PrefixId
from kvstore_codec.model_spec import ModelSpec
from kvstore_codec.page import PageNamespace

MEMORY_BYTES = 256 << 20
"""Summaries kept in the process. One of SmolLM2 has 445 KB a chunk, or 835 KB in periods of two layers:
enough for 154,000 or 82,000 tokens."""
_MOST_NAMESPACES = 8
"""Models whose page stores are open at a time."""

OpenPages = Callable[[PageNamespace], PageStore]
_Key = tuple[PrefixId, SummaryShape]


@dataclass(frozen=True, slots=True)
class FoundSummaries:
    """Summaries of the chunks that were asked for, as far as there are any."""

    summaries: Mapping[PrefixId, ChunkSummary]
    read_bytes: int
    """Size of those that were read from storage nodes."""


class SummaryStore:
    """Finds and publishes summaries. Each is a page under the chunk's `prefix_id`, which implies model, context and
    position; a node may evict it like a chunk. Thread-safe."""

    def __init__(self, open_pages: OpenPages, timeout_s: float, memory_bytes: int = MEMORY_BYTES) -> None:
        """`timeout_s` limits how long `find` waits for storage nodes."""
        self._open_pages, self._timeout_s, self._memory_bytes = open_pages, timeout_s, memory_bytes
        self._lock = threading.Lock()
        self._known: OrderedDict[_Key, ChunkSummary] = OrderedDict()
        self._known_bytes = 0
        self._pages: OrderedDict[bytes, PageStore] = OrderedDict()
        self._joined: tuple[_Key, PrefixKeys] | None = None
        """The prefix that was asked last, by its last chunk."""

    def known(self, prefix_ids: Sequence[PrefixId], shape: SummaryShape) -> FoundSummaries:
        """Those that are in the process. Does not block."""
        with self._lock:
            found = {name: self._known.get((name, shape)) for name in prefix_ids}
            for name in prefix_ids:
                if (name, shape) in self._known:
                    self._known.move_to_end((name, shape))
        return FoundSummaries({name: kept for name, kept in found.items() if kept is not None}, 0)

    def find(self, spec: ModelSpec, prefix_ids: Sequence[PrefixId], shape: SummaryShape) -> FoundSummaries:
        """Those that are in the process or on storage nodes. A summary that is damaged, or does not come in time, is
        not found."""
        found = dict(self.known(prefix_ids, shape).summaries)
        missing = [name for name in prefix_ids if name not in found]
        if not missing:
            return FoundSummaries(found, 0)
        memory = memoryview(bytearray(shape.size_bytes * len(missing)))
        views = [memory[i * shape.size_bytes : (i + 1) * shape.size_bytes] for i in range(len(missing))]
        result = self._store(spec, shape).get_into(missing, views, self._timeout_s)
        read_bytes = 0
        for name, view, ok in zip(missing, views, result.ok, strict=True):
            if not ok:
                continue
            read_bytes += len(view)
            try:
                found[name] = ChunkSummary.from_bytes(view.tobytes(), shape)
            except InvalidKVError:
                continue
            self._keep((name, shape), found[name])
        return FoundSummaries(found, read_bytes)

    def joined(
        self, prefix_ids: Sequence[PrefixId], found: FoundSummaries, shape: SummaryShape
    ) -> PrefixKeys:
        """The keys of a prefix, of which all summaries were found. Those of the prefix that was asked last are kept,
        because most questions about a prefix come one after the other."""
        key = prefix_ids[-1], shape
        with self._lock:
            kept = self._joined
        if kept is not None and kept[0] == key:
            return kept[1]
        keys = PrefixKeys([found.summaries[name] for name in prefix_ids], shape)
        with self._lock:
            self._joined = (key, keys)
        return keys

    def publish(self, spec: ModelSpec, shape: SummaryShape, made: Mapping[PrefixId, ChunkSummary]) -> None:
        """Keep these summaries, and store them on the nodes in the background, unless they are there."""
        if not made:
            return
        for name, summary in made.items():
            self._keep((name, shape), summary)
        store = self._store(spec, shape)
        store.submit_put(list(made), [summary.to_bytes() for summary in made.values()])
        store.finished()  # nobody waits for the outcome: a summary that was not stored is made again

    def _store(self, spec: ModelSpec, shape: SummaryShape) -> PageStore:
        layers = ",".join(map(str, shape.layers))
        layout = (
            f"key-summary.v3 4 bits, mean+deviation i8 f32 unit{shape.unit_tokens} "
            f"{shape.kv_heads}x{shape.tokens}x{shape.head_dim} layers {layers}"
        )
        namespace = PageNamespace(spec.digest, layout)
        with self._lock:
            store = self._pages.pop(namespace.digest, None)
            if store is None or store.is_closed:
                store = self._open_pages(namespace)
            self._pages[namespace.digest] = store
            old = self._pages.popitem(last=False)[1] if len(self._pages) > _MOST_NAMESPACES else None
        if old is not None:
            old.close()
        return store

    def _keep(self, key: _Key, summary: ChunkSummary) -> None:
        with self._lock:
            replaced = self._known.pop(key, None)
            if replaced is not None:
                self._known_bytes -= replaced.size_bytes
            self._known[key] = summary
            self._known_bytes += summary.size_bytes
            while self._known_bytes > self._memory_bytes:
                self._known_bytes -= self._known.popitem(last=False)[1].size_bytes
