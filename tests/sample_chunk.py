"""Chunks to store: sound, but with random bytes for frames, because storage never looks into them."""

import random
from dataclasses import dataclass

from blake3 import blake3

from kvstore_codec.chunk import ChunkHeader, write_header
from kvstore_codec.encoding import Encoding
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype

GEOMETRY = Geometry(layers=8, kv_heads=2, head_dim=16, dtype=KVDtype.BFLOAT16)


@dataclass(frozen=True)
class SampleChunk:
    chunk_id: ChunkId
    encoding: str
    header: ChunkHeader
    data: bytes

    def frames(self, first: int, count: int) -> bytes:
        offset, length = self.header.range_bytes(first, count)
        return self.data[offset : offset + length]


def sample_chunk(
    content: int = 0,
    context: int = 0,
    encoding: str = "exact-zstd",
    frame_bytes: int = 1000,
    geometry: Geometry = GEOMETRY,
    calibration: bytes | None = None,
    prefix_id: PrefixId | None = None,
) -> SampleChunk:
    """The same arguments give the same bytes, another `context` or `prefix_id` the same content elsewhere."""
    chunk_id = ChunkId(
        ContentId(blake3(b"content %d" % content).digest()),
        prefix_id or PrefixId(blake3(b"content %d context %d" % (content, context)).digest()),
    )
    generator = random.Random(f"{content} {context} {encoding} {calibration!r}")
    frames = [
        generator.randbytes(frame_bytes + generator.randrange(frame_bytes))
        for _ in range(geometry.frame_count)
    ]
    parsed = Encoding.parse(encoding)
    header, header_bytes = write_header(bytes(32), chunk_id, parsed, geometry, frames, calibration)
    return SampleChunk(chunk_id, encoding, header, b"".join([header_bytes, *frames]))
