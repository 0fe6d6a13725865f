"""Description of a stored variant of a chunk, for lists of the chunks on a node."""

from dataclasses import dataclass

from kvstore_codec.identity import ChunkId


@dataclass(frozen=True, slots=True)
class StoredVariant:
    """One encoding of a chunk on a node. `calibration` is the digest of the calibration that the encoding needs, if
    any. `ttl_left_s` is 0 for a variant that does not expire. `number` is the number of chunks before it in its text.
    `behind` lists up to 16 of these chunks that are on the same node, nearest first."""

    chunk_id: ChunkId
    encoding: str
    size_bytes: int
    calibration: bytes | None = None
    in_memory: bool = True
    on_disk: bool = False
    pinned: bool = False
    ttl_left_s: int = 0
    tenant: str = ""
    cost: float = 0.0
    number: int = 0
    behind: tuple[ChunkId, ...] = ()
