"""Signed chunks: what a reader with keys accepts, and that no byte of a signed chunk can be changed."""

import struct

import msgpack
import pytest
import xxhash

from kvstore_codec.chunk import ChunkHeader, read_header, write_header
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ChunkFormatError, SignatureError, UnsignedChunkError
from kvstore_codec.page import RAW, ZSTD, PageNamespace, decode_page, verify_raw_page, write_page
from kvstore_codec.payload import OPENING_BYTES
from kvstore_codec.signing import verified
from kvstore_codec.signing_keys import SIGNATURE_BYTES, SigningKeys
from kvstore_codec.whole_chunk import verify_chunk
from tests.sample_chunk import GEOMETRY, sample_chunk

SECRETS = [bytes([number]) * 32 for number in range(3)]
KEYS = SigningKeys(SECRETS[:1])
PLAIN = sample_chunk()
# xxh3 of 129 to 240 bytes multiplies the first word of its input, XOR the first word of its secret, by the next word:
# if the first word is that of the secret, the next may be anything.
SECRET_WORD = bytes.fromhex("b8fe6c3923a44bbe")


def frame(hidden: bytes) -> bytes:
    return SECRET_WORD + hidden.ljust(8, b"\0") + bytes(184)


def signed(
    keys: SigningKeys | None = KEYS, hidden: bytes = b"honest"
) -> tuple[ChunkHeader, bytes, list[bytes]]:
    frames = [frame(hidden)] * GEOMETRY.frame_count
    encoding = Encoding.parse("exact-zstd")
    header, data = write_header(bytes(32), PLAIN.chunk_id, encoding, GEOMETRY, frames, keys=keys)
    return header, data, frames


def resealed(body: bytes) -> bytes:
    """A header with this msgpack body and the right checksum, as an attacker makes it."""
    data = struct.pack("<4sHI", b"KVC\0", 2, len(body)) + body
    return data + struct.pack("<Q", xxhash.xxh3_64_intdigest(data))


def test_a_reader_accepts_what_one_of_its_keys_has_signed() -> None:
    made, data, frames = signed()
    assert read_header(data) == made
    assert not read_header(data).is_verified
    for keys in (KEYS, SigningKeys(SECRETS), SigningKeys(SECRETS[::-1])):
        header = verified(read_header(data), data, keys)
        assert header.is_verified
        for number, data_of_frame in enumerate(frames):
            header.verify_frame(number, data_of_frame)
    assert verify_chunk([data, *frames], len(data) + sum(map(len, frames))) == made


def test_unsigned_and_foreign_chunks_are_refused() -> None:
    for secrets in (SECRETS[1:2], SECRETS[1:]):
        _, data, _ = signed()
        with pytest.raises(SignatureError, match="none of this reader's keys"):
            verified(read_header(data), data, SigningKeys(secrets))
    _, data, _ = signed(None)
    with pytest.raises(UnsignedChunkError, match="is not signed"):
        verified(read_header(data), data, KEYS)


def test_the_first_key_signs() -> None:
    _, data, _ = signed(SigningKeys([SECRETS[1], SECRETS[0]]))
    verified(read_header(data), data, SigningKeys(SECRETS[1:2]))
    with pytest.raises(SignatureError):
        verified(read_header(data), data, KEYS)


def test_no_byte_of_a_signed_header_can_be_changed() -> None:
    _, data, _ = signed()
    body = data[10:-8]
    for place in range(len(body)):
        forged = resealed(body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
        with pytest.raises(ChunkFormatError):
            verified(read_header(forged), forged, KEYS)


def test_no_field_of_a_signed_header_can_be_moved_added_or_left_out() -> None:
    made, data, _ = signed()
    fields = msgpack.unpackb(data[10:-8])
    names = [name for name in fields if name != "signature"]
    orders = [["signature", *names], [*names[1:], names[0], "signature"], [*names, "signature", "more"]]
    for order in orders:
        forged = resealed(msgpack.packb({name: fields.get(name, made.signature) for name in order}))
        with pytest.raises(SignatureError):
            verified(read_header(forged), forged, KEYS)
    for left in ("signature", "digests"):
        forged = resealed(msgpack.packb({name: fields[name] for name in fields if name != left}))
        with pytest.raises(ChunkFormatError, match="of a signed chunk"):
            read_header(forged)
    forged = resealed(msgpack.packb({name: fields[name] for name in names if name != "digests"}))
    with pytest.raises(UnsignedChunkError):
        verified(read_header(forged), forged, KEYS)


@pytest.mark.parametrize("name", ["signature", "digests"])
@pytest.mark.parametrize("value", [b"", b"1", 5, "text", bytes(1000), []])
def test_malformed_signatures_are_no_chunks(name: str, value: object) -> None:
    _, data, _ = signed()
    forged = resealed(msgpack.packb(msgpack.unpackb(data[10:-8]) | {name: value}))
    with pytest.raises(ChunkFormatError):
        read_header(forged)


def test_a_frame_with_the_same_checksum_is_not_the_one_that_was_signed() -> None:
    """Checksums find damage. Anybody can make another frame with the same one."""
    made, data, frames = signed()
    other = frame(b"poison")
    assert other != frames[0]
    assert xxhash.xxh3_64_intdigest(other) == made.frame_checksums[0]
    read_header(data).verify_frame(0, other)  # a reader without keys, and a node, cannot tell
    with pytest.raises(SignatureError, match="not the one that was signed"):
        verified(read_header(data), data, KEYS).verify_frame(0, other)
    with pytest.raises(SignatureError):
        verified(read_header(data), data, KEYS).verify_frames(0, 1, other)


@pytest.mark.parametrize("encoding", [RAW, ZSTD])
def test_pages_are_signed_too(encoding: Encoding) -> None:
    namespace = PageNamespace(b"model", "layout")
    (name,) = namespace.chunk_ids([b"key"])
    page = bytearray(b"a page" * 100)
    made, parts = write_page(namespace, name, encoding, memoryview(page), KEYS)
    whole = b"".join(parts)
    header = verified(read_header(whole), whole, KEYS)
    frame_bytes = memoryview(bytearray(whole[made.header_bytes :]))
    if encoding is RAW:
        verify_raw_page(header, frame_bytes[:OPENING_BYTES], frame_bytes[OPENING_BYTES:])
    else:
        view = memoryview(bytearray(len(page)))
        decode_page(header, frame_bytes, view)
        assert view == page
    with pytest.raises(SignatureError):
        verified(read_header(whole), whole, SigningKeys(SECRETS[1:]))


def test_the_price_in_bytes() -> None:
    """16 bytes a frame, and some 63 a chunk."""
    _, plain, frames = signed(None)
    _, data, _ = signed()
    assert len(data) - len(plain) - 16 * len(frames) <= SIGNATURE_BYTES + 24
