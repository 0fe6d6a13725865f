"""A stored variant of a chunk, as lists of what a node holds name it."""

from dataclasses import dataclass

from kvstore_codec.identity import ChunkId


@dataclass(frozen=True, slots=True)
class StoredVariant:
    """`calibration` is a digest, where the encoding needs one; `ttl_left_s` 0: stays. `number` chunks stand before
    it in its text, and `behind` are those of them that are on the same node, nearest first, 16 at most."""

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
