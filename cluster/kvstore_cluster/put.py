"""A chunk on its way in: start, write, then commit or revoke."""

from typing import Protocol

from kvstore_cluster.arena import Arena, Extent
from kvstore_cluster.index import Entry, VariantKey
from kvstore_codec.chunk import verify_chunk
from kvstore_codec.errors import ForeignChunkError, KVStoreError, PutStateError
from kvstore_codec.identity import ChunkId


class Accept(Protocol):
    def __call__(self, put: "PendingPut", entry: Entry) -> bool: ...


class Drop(Protocol):
    def __call__(self, put: "PendingPut", *, rejected: bool) -> None: ...


class PendingPut:
    """Memory reserved for one chunk, invisible until committed. Used by one thread; made by
    `StorageNode.begin_put`. It ends exactly once, through `accept` or `drop`."""

    def __init__(
        self, arena: Arena, extent: Extent, chunk_id: ChunkId, encoding: str, *, accept: Accept, drop: Drop
    ) -> None:
        self._arena = arena
        self.extent = extent
        self._chunk_id = chunk_id
        self._encoding = encoding
        self._accept = accept
        self._drop = drop
        self._open = True
        self.written_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes to the chunk. Raises PutStateError past the announced size or after the end."""
        self._require_open()
        if self.written_bytes + len(data) > self.extent.size_bytes:
            raise PutStateError(
                f"chunk {self._chunk_id.short} was announced with {self.extent.size_bytes} bytes and has more"
            )
        source = memoryview(data)
        for view in self._arena.views(self.extent, self.written_bytes, len(source)):
            view[:] = source[: len(view)]
            source = source[len(view) :]
        self.written_bytes += len(data)

    def commit(self) -> bool:
        """Verifies the whole chunk and makes it visible; False when the same chunk was stored meanwhile.

        Raises ChunkFormatError when the bytes are not a sound chunk, or not the one announced, and
        PutStateError when some are missing; then nothing is stored. Either way the put has ended.
        """
        self._require_open()
        try:
            entry = self._verified()
        except KVStoreError:
            self._end(rejected=True)
            raise
        self._open = False
        return self._accept(self, entry)

    def revoke(self) -> None:
        """Takes the put back. Does nothing when it has ended."""
        if self._open:
            self._end(rejected=False)

    def _verified(self) -> Entry:
        if self.written_bytes != self.extent.size_bytes:
            raise PutStateError(
                f"chunk {self._chunk_id.short} was announced with {self.extent.size_bytes} bytes, "
                f"but {self.written_bytes} came"
            )
        header = verify_chunk(self._arena.views(self.extent), self.extent.size_bytes)
        found, wanted = (header.chunk_id, header.encoding.name), (self._chunk_id, self._encoding)
        if found != wanted:
            raise ForeignChunkError(
                f"the bytes announced as chunk {self._chunk_id.short} in {self._encoding} are chunk "
                f"{header.chunk_id.short} in {header.encoding.name}"
            )
        header_bytes = b"".join(self._arena.views(self.extent, 0, header.header_bytes))
        return Entry(VariantKey.of(self._chunk_id, self._encoding), header, header_bytes, self.extent)

    def _end(self, *, rejected: bool) -> None:
        self._open = False
        self._drop(self, rejected=rejected)

    def _require_open(self) -> None:
        if not self._open:
            raise PutStateError(f"the put of chunk {self._chunk_id.short} has ended already")
