"""Pages as chunks: named apart from everything else, and verified to the last byte."""

from dataclasses import replace

import pytest
import torch

from kvstore_codec.chunk import read_header
from kvstore_codec.codec import decode_frames
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ChunkFormatError, ForeignChunkError, InvalidKVError
from kvstore_codec.identity import ROOT_PREFIX, content_id, prefix_id
from kvstore_codec.page import (
    MAX_PAGE_BYTES,
    RAW,
    PageNamespace,
    decode_page,
    may_fill,
    require_page,
    verify_raw_page,
    write_page,
)
from kvstore_codec.payload import OPENING_BYTES
from kvstore_codec.whole_chunk import verify_chunk

NAMESPACE = PageNamespace(b"model", "layout")
(PAGE_ID,) = NAMESPACE.chunk_ids([b"key"])
ZSTD = Encoding.parse("exact-zstd")
BODY = bytes(range(256)) * 5


def chunk(encoding: Encoding, body: bytes = BODY) -> bytes:
    header, parts = write_page(NAMESPACE, PAGE_ID, encoding, memoryview(body))
    data = b"".join(parts)
    assert len(data) == header.size_bytes
    return data


@pytest.mark.parametrize("encoding", [RAW, ZSTD])
@pytest.mark.parametrize("size_bytes", [1, 8, 9, 1000, 1279])
def test_a_page_is_a_sound_chunk(encoding: Encoding, size_bytes: int) -> None:
    data = chunk(encoding, BODY[:size_bytes])
    header = verify_chunk(data, len(data))
    require_page(header, NAMESPACE, PAGE_ID)
    assert may_fill(header, size_bytes)
    out = bytearray(size_bytes)
    frame = memoryview(data)[header.header_bytes :]
    if encoding == RAW:
        out[:] = frame[OPENING_BYTES:]
        verify_raw_page(header, frame[:OPENING_BYTES], memoryview(out))
    else:
        decode_page(header, frame, memoryview(out))
    assert out == BODY[:size_bytes]


def test_every_bit_of_a_page_counts() -> None:
    data = bytearray(chunk(RAW, BODY[:20]))
    header = read_header(bytes(data))
    frame = memoryview(data)[header.header_bytes :]
    for bit in range(8 * len(frame)):
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChunkFormatError):
            verify_raw_page(header, frame[:OPENING_BYTES], frame[OPENING_BYTES:])
        frame[bit // 8] ^= 1 << bit % 8


def test_a_compressed_page_of_another_size_is_refused() -> None:
    data = chunk(ZSTD)
    header = read_header(data)
    with pytest.raises(InvalidKVError, match="1280 bytes, not 1281"):
        decode_page(header, memoryview(data)[header.header_bytes :], memoryview(bytearray(len(BODY) + 1)))


def test_a_raw_page_copies_nothing() -> None:
    body = bytearray(BODY)
    _, parts = write_page(NAMESPACE, PAGE_ID, RAW, memoryview(body))
    body[0] ^= 1
    assert parts[-1][0] == body[0]


def test_a_page_has_limits() -> None:
    with pytest.raises(InvalidKVError, match="not 0"):
        write_page(NAMESPACE, PAGE_ID, RAW, memoryview(b""))
    with pytest.raises(InvalidKVError, match="1 to"):
        write_page(NAMESPACE, PAGE_ID, RAW, memoryview(bytearray(MAX_PAGE_BYTES + 1)))
    with pytest.raises(InvalidKVError, match="rank 2"):
        PageNamespace(b"", "", rank=2, world_size=2)


def test_names_cover_everything_and_no_field_runs_into_the_next() -> None:
    names = [
        NAMESPACE,
        replace(NAMESPACE, model=b"model2"),
        replace(NAMESPACE, model=b"mode", layout="llayout"),
        replace(NAMESPACE, layout="layout2"),
        replace(NAMESPACE, world_size=2),
        replace(NAMESPACE, rank=1, world_size=2),
        replace(NAMESPACE, salt=b"salt"),
    ]
    ids = [name.chunk_ids([b"key"], salt)[0] for name in names for salt in (b"", b"tenant")]
    ids += NAMESPACE.chunk_ids([b"", b"key2", b"ke"]) + NAMESPACE.chunk_ids([b"tkey"], b"tenan")
    assert len({chunk_id.content_id for chunk_id in ids}) == len(ids)
    assert len({chunk_id.prefix_id for chunk_id in ids}) == len(ids)


def test_names_stay() -> None:
    assert PAGE_ID.content_id.hex() == "43b68beb08c57e033b034fb512cd095107b02d8638e734339b769423267af273"
    assert PAGE_ID.prefix_id.hex() == "1d09919b7860d176f1f59759a7c6447d9de2b444d5501fe40b8ddd479102bc70"


def test_a_page_is_never_tokens() -> None:
    content = content_id(NAMESPACE.digest, b"", [1, 2, 3])
    assert content != NAMESPACE.chunk_ids([bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])])[0].content_id
    assert PAGE_ID.prefix_id != prefix_id(ROOT_PREFIX, PAGE_ID.content_id)
    data = chunk(RAW)
    header = read_header(data)
    with pytest.raises(ForeignChunkError, match="model"):
        require_page(header, replace(NAMESPACE, salt=b"other"), PAGE_ID)
    out = torch.zeros((1, 1, 1, 1), dtype=torch.bfloat16)
    with pytest.raises(ForeignChunkError, match="page"):
        decode_frames(header, 0, 1, memoryview(data)[header.header_bytes :], out, out.clone())
