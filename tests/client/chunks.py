"""Chunks for tests: random KV of a made-up model."""

import torch

from kvstore_api.placement import Member
from kvstore_client.match import StoredChunk, Variant
from kvstore_codec.codec import EncodedChunk, encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.identity import ChunkId, chunk_ids
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec

SPEC = ModelSpec(
    model_id="test",
    weights_digest=bytes(32),
    layers=6,
    kv_heads=2,
    head_dim=16,
    dtype=KVDtype.FLOAT32,
    rope=RopeSpec("default", 10000.0, 16, ()),
)
MEMBER = Member("node-0", "127.0.0.1:1")


def ids(chunks: int, seed: int = 0) -> list[ChunkId]:
    tokens = torch.randint(0, 1000, (256 * chunks,), generator=torch.Generator().manual_seed(seed))
    return chunk_ids(SPEC.digest, b"", tokens.tolist())


def random_kv(seed: int = 0, spec: ModelSpec = SPEC) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.layers, spec.kv_heads, 256, spec.head_dim)
    return tuple(torch.randn(shape, generator=generator).to(spec.dtype.torch) for _ in range(2))  # type: ignore[return-value]


def encoded_chunk(chunk_id: ChunkId, seed: int = 0) -> EncodedChunk:
    keys, values = random_kv(seed)
    return encode_chunk(keys, values, spec=SPEC, chunk_id=chunk_id, encoding=Encoding.parse("exact-zstd"))


def stored_chunks(count: int) -> list[StoredChunk]:
    found: list[StoredChunk] = []
    for index, chunk_id in enumerate(ids(count)):
        encoded = encoded_chunk(chunk_id, index)
        found.append(StoredChunk(chunk_id, (Variant(encoded.header, encoded.parts[0]),), MEMBER, 256 * index))
    return found
