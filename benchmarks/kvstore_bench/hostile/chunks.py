"""Parsers of what a chunk consists of: its header, its signature, and frames of every coder."""

import functools
import random
import struct
from collections.abc import Callable, Sequence

import msgpack  # type: ignore[import-untyped]
import numpy as np
import xxhash
from blake3 import blake3

from kvstore_bench.fuzz.edits import edit_bytes, edit_number
from kvstore_bench.fuzz.judge import decoded, with_writers_checksum
from kvstore_bench.fuzz.mutants import mutant
from kvstore_bench.fuzz.seeds import seeds
from kvstore_bench.hostile.parser import Parser, WrongResultError
from kvstore_bench.hostile.values import MSGPACK, mutated_document
from kvstore_codec.chunk import (
    FIXED_PREFIX_BYTES,
    MAGIC,
    MAX_HEADER_BYTES,
    VERSION,
    read_header,
    write_header,
)
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import CodecError, KVStoreError
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype
from kvstore_codec.page import PageNamespace, decode_page, require_page, write_page
from kvstore_codec.payload import OPENING_BYTES
from kvstore_codec.signing import verified
from kvstore_codec.signing_keys import SIGNATURE_BYTES, SigningKeys
from kvstore_codec.token_order import TokenOrder
from kvstore_codec.whole_chunk import verify_chunk

_CHUNK = ChunkId(ContentId(bytes(32)), PrefixId(b"\1" * 32))
_KEYS = SigningKeys([bytes(32)])
_KEY_CONTEXT = "kvstore 2026 chunk signature v1"
_PAGE = np.random.default_rng(3).integers(0, 9, 3000, np.uint8).tobytes()
_NAMESPACE = PageNamespace(b"model", "layout")
_FILL = 5.0


def parsers() -> list[Parser]:
    frames = [
        Parser(name, functools.partial(_chunks, coder), _frame_mutant(coder), _decode, (KVStoreError,))
        for name, coder in (("raw", "raw"), ("zstd", "zstd"), ("pco", "pco"), ("hevc", "hevc-cpu"))
    ]
    return [
        Parser("chunk-header", _headers, _header_mutant, _read_header, (CodecError,)),
        Parser("signature", lambda: _headers()[1:], _signed_mutant, _verify, (CodecError,)),
        *frames,
        Parser("page", _pages, _page_mutant, _read_page, (CodecError,)),
    ]


@functools.cache
def _headers() -> Sequence[bytes]:
    """A small header, a signed one, and a signed one of the most frames and the longest token order."""
    small = Geometry(4, 2, 16, KVDtype.BFLOAT16, tokens=256)
    large = Geometry(64, 1, 1, KVDtype.BFLOAT16, tokens=65_536, frame_tokens=1024, period_layers=1)
    order = tuple(range(65_536))
    return (
        _header(small, TokenOrder((3, 1, 2), (0, 5)), None),
        _header(small, TokenOrder((3, 1, 2), (0, 5)), _KEYS),
        _header(large, TokenOrder(order, order), _KEYS),
    )


def _header(geometry: Geometry, order: TokenOrder, keys: SigningKeys | None) -> bytes:
    frames = [bytes(16)] * geometry.frame_count
    encoding = Encoding.parse("exact-zstd")
    return write_header(bytes(32), _CHUNK, encoding, geometry, frames, None, order, keys)[1]


def _header_mutant(rng: random.Random) -> bytes:
    return sealed_header(_header_body(rng))


def _header_body(rng: random.Random) -> bytes:
    fields = msgpack.unpackb(_headers()[rng.randrange(2)][FIXED_PREFIX_BYTES:-8])
    return mutated_document(rng, MSGPACK, fields, MAX_HEADER_BYTES - FIXED_PREFIX_BYTES - 8)


def sealed_header(body: bytes) -> bytes:
    """The header of a chunk with these encoded fields."""
    return _with_checksum(struct.pack("<4sHI", MAGIC, VERSION, len(body)) + body)


def _with_checksum(signed: bytes) -> bytes:
    return signed + struct.pack("<Q", xxhash.xxh3_64_intdigest(signed))


def _read_header(data: bytes) -> None:
    header = read_header(data)
    if header.range_bytes(0, header.geometry.frame_count)[1] != sum(header.frame_lengths):
        raise WrongResultError("the ranges of the frames differ from their lengths")
    if header.token_order is not None:
        header.token_order.require(header.geometry.tokens)


def _signed_mutant(rng: random.Random) -> bytes:
    """The writer has the key: what it changed, it has signed again in nine of ten mutants."""
    body = bytearray(_header_body(rng))
    covered = struct.pack("<4sHI", MAGIC, VERSION, len(body)) + body
    if rng.random() < 0.9 and len(body) > SIGNATURE_BYTES:
        covered = covered[:-SIGNATURE_BYTES]
        if rng.random() < 0.9:
            covered += _KEYS.sign(covered)
        else:  # by a key that the reader does not have, or with a part of the signature only
            covered += rng.randbytes(8) + blake3(covered, derive_key_context=_KEY_CONTEXT).digest()
    return _with_checksum(covered)


def _verify(data: bytes) -> None:
    if not verified(read_header(data), data, _KEYS).is_verified:
        raise WrongResultError("a signed header that is not verified")


@functools.cache
def _chunks(coder: str) -> Sequence[bytes]:
    return tuple(seed.data for seed in seeds() if seed.header.encoding.coder.startswith(coder))


def _frame_mutant(coder: str) -> Callable[[random.Random], bytes]:
    return lambda rng: with_writers_checksum(mutant(rng.getrandbits(62), 0, coder)).data


def _decode(data: bytes) -> None:
    decoded(data, _FILL)


@functools.cache
def _pages() -> Sequence[bytes]:
    return tuple(
        b"".join(write_page(_NAMESPACE, _CHUNK, Encoding.parse(name), memoryview(_PAGE))[1])
        for name in ("exact-raw", "exact-zstd")
    )


def _page_mutant(rng: random.Random) -> bytes:
    """A page whose frame is edited, under a header with its length and checksum."""
    page = rng.choice(_pages())
    header = read_header(page)
    frame = bytearray(page[header.header_bytes :])
    if rng.random() < 0.4:
        edit_number(rng, frame, rng.choice((0, OPENING_BYTES)))
    else:
        edit_bytes(rng, frame, rng.choice((0, OPENING_BYTES)))
    return (
        write_header(_NAMESPACE.digest, _CHUNK, header.encoding, header.geometry, [frame])[1] + frame
        if frame
        else page[: header.header_bytes]
    )


def _read_page(data: bytes) -> None:
    header = verify_chunk(data, len(data))
    require_page(header, _NAMESPACE, _CHUNK)
    room = bytearray(b"\x55" * (len(_PAGE) + 8))
    frame = memoryview(data)[header.header_bytes :]
    if header.encoding.coder == "zstd":
        decode_page(header, frame, memoryview(room)[: len(_PAGE)])
    if bytes(room[len(_PAGE) :]) != b"\x55" * 8:
        raise WrongResultError("a page was written beyond its end")
