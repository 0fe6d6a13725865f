"""A pending put of one chunk: begin, write, then commit or revoke."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kvstore_cluster.arena import Arena, Extent
from kvstore_cluster.disk import RecordMeta
from kvstore_cluster.durability import Durability
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.errors import ForeignChunkError, KVStoreError, PutStateError
from kvstore_codec.identity import ChunkId
from kvstore_codec.whole_chunk import verify_chunk


@dataclass(frozen=True, slots=True)
class PutOptions:
    """Options of a put. A `ttl_s` of 0 means that the chunk does not expire. A `cost` of 0 means that the cost is the
    chunk's number of tokens. `number` chunks precede the chunk in its text; `behind` names some of those that are on
    the same node, nearest first. `number` and `behind` are hints for the eviction order among chunks of one tenant."""

    durability: Durability = Durability.DEFAULT
    ttl_s: float = 0.0
    tenant: str = ""
    cost: float = 0.0
    number: int = 0
    behind: tuple[ChunkId, ...] = ()
    copied_at: int | None = None
    """For a copy from another node: the newest forgetting of a tenant (`Forgotten.newest`) that it has applied."""
    refused: frozenset[bytes] = frozenset()
    """blake3 digests of headers that the caller does not trust. The chunk replaces a stored one with such a header."""


class Accept(Protocol):
    def __call__(self, put: "PendingPut", meta: RecordMeta) -> bool: ...


class Drop(Protocol):
    def __call__(self, put: "PendingPut", *, rejected: BaseException | None) -> None: ...


class PendingPut:
    """Memory reserved for one chunk, which is invisible until `commit`. `StorageNode.begin_put` creates it. Used by one
    thread. A put ends exactly once, through `accept` or `drop`."""

    def __init__(
        self,
        arena: Arena,
        extent: Extent,
        chunk_id: ChunkId,
        encoding: str,
        options: PutOptions,
        *,
        before: int,
        refused: int,
        accept: Accept,
        drop: Drop,
    ) -> None:
        """`before` is the acquired slot of the preceding chunk in the text, and `refused` that of the stored chunk to
        replace; NO_SLOT for none."""
        self._arena = arena
        self.extent = extent
        self.options = options
        self.before, self.refused = before, refused
        self._chunk_id = chunk_id
        self._encoding = encoding
        self._accept = accept
        self._drop = drop
        self._open = True
        self.written_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes to the chunk. Raises PutStateError past the announced size or after the put has ended."""
        self._require_open()
        if self.written_bytes + len(data) > self.extent.size_bytes:
            raise PutStateError(
                f"chunk {self._chunk_id.short} was announced with a size of {self.extent.size_bytes} bytes, "
                "but has more"
            )
        source = memoryview(data)
        for view in self._arena.views(self.extent, self.written_bytes, len(source)):
            view[:] = source[: len(view)]
            source = source[len(view) :]
        self.written_bytes += len(data)

    def views(self) -> Iterator[memoryview]:
        """Writable views of the bytes that are still missing, in order. A caller may receive bytes directly into them,
        and must then call `advance`. Raises PutStateError after the put has ended."""
        self._require_open()
        missing_bytes = self.extent.size_bytes - self.written_bytes
        return self._arena.views(self.extent, self.written_bytes, missing_bytes)

    def advance(self, size_bytes: int) -> None:
        """Records that the next `size_bytes` of `views` were filled. Raises PutStateError past the announced size."""
        if not 0 <= size_bytes <= self.extent.size_bytes - self.written_bytes:
            raise PutStateError(f"chunk {self._chunk_id.short} has no {size_bytes} bytes left to come")
        self.written_bytes += size_bytes

    def commit(self) -> bool:
        """Verifies the whole chunk and makes it visible. False when another put stored the same chunk first. Returns
        once the chunk is as durable as its options require.

        Raises ChunkFormatError when the bytes are not a sound chunk or not the announced one, PutStateError when bytes
        are missing, and NotDurableError. After an exception nothing is stored. The put has ended in every case.
        """
        self._require_open()
        try:
            meta = self._verified()
        except KVStoreError as error:
            self._end(rejected=error)
            raise
        self._open = False
        return self._accept(self, meta)

    def revoke(self) -> None:
        """Cancels the put. Does nothing when it has ended."""
        if self._open:
            self._end(rejected=None)

    def _verified(self) -> RecordMeta:
        if self.written_bytes != self.extent.size_bytes:
            raise PutStateError(
                f"chunk {self._chunk_id.short} was announced with a size of {self.extent.size_bytes} bytes, "
                f"but has {self.written_bytes}"
            )
        header = verify_chunk(self._arena.views(self.extent), self.extent.size_bytes)
        found, wanted = (header.chunk_id, header.encoding.name), (self._chunk_id, self._encoding)
        if found != wanted:
            raise ForeignChunkError(
                f"the bytes announced as chunk {self._chunk_id.short} in {self._encoding} are chunk "
                f"{header.chunk_id.short} in {header.encoding.name}"
            )
        return _meta_of(header, self.options)

    def _end(self, *, rejected: BaseException | None) -> None:
        self._open = False
        self._drop(self, rejected=rejected)

    def _require_open(self) -> None:
        if not self._open:
            raise PutStateError(f"the put of chunk {self._chunk_id.short} has ended already")


def _meta_of(header: ChunkHeader, options: PutOptions) -> RecordMeta:
    """Metadata of a chunk, from its header and the options of its put."""
    return RecordMeta(
        header.chunk_id,
        header.encoding.name,
        header.size_bytes,
        header.header_bytes,
        calibration=header.calibration,
        tenant=options.tenant,
        cost=options.cost or float(header.geometry.tokens),
        number=options.number,
    )
