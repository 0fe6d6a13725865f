import contextlib

from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore_api.bulk import decode_put_request, decode_read_reply, encode_put_request, encode_read_piece
from kvstore_api.v1 import kvstore_pb2 as pb

indices = st.integers(0, (1 << 32) - 1)
payloads = st.binary(max_size=300)


@given(indices, st.lists(payloads, max_size=4))
def test_a_read_piece_is_what_protobuf_reads(index: int, parts: list[bytes]) -> None:
    message = encode_read_piece(index, [memoryview(part) for part in parts])
    assert pb.ReadReply.FromString(message) == pb.ReadReply(range=index, data=b"".join(parts))
    piece = decode_read_reply(message)
    assert (piece.range, bytes(piece.data), piece.status) == (index, b"".join(parts), pb.READ_STATUS_OK)


@given(indices, payloads, st.sampled_from(pb.ReadStatus.values()))
def test_every_read_reply_of_protobuf_is_read(index: int, data: bytes, status: int) -> None:
    message = pb.ReadReply(range=index, data=data, status=status).SerializeToString()
    piece = decode_read_reply(message)
    assert (piece.range, bytes(piece.data), piece.status) == (index, data, status)


@given(payloads)
def test_put_data_is_what_protobuf_reads(data: bytes) -> None:
    message = encode_put_request(memoryview(data))
    assert pb.PutRequest.FromString(message) == pb.PutRequest(data=data)
    decoded = decode_put_request(message)
    assert isinstance(decoded, memoryview)
    assert bytes(decoded) == data


@given(st.binary(min_size=32, max_size=32), st.integers(0, 1 << 40))
def test_other_steps_of_a_put_stay_messages(content: bytes, size_bytes: int) -> None:
    start = pb.PutStart(chunk=pb.ChunkRef(content_id=content), encoding="exact-zstd", size_bytes=size_bytes)
    for step in (
        pb.PutRequest(start=start),
        pb.PutRequest(end=pb.PutEnd()),
        pb.PutRequest(revoke=pb.PutRevoke()),
    ):
        assert decode_put_request(encode_put_request(step)) == step


@given(st.binary(max_size=60))
@example(b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
@example(b"\x08\x80")
@example(b"\x08\xff\xff\xff\xff\xff\x01\x12\x01a")
@example(b"\x12\x05abc")
@example(b"\x12\x01abc")
def test_arbitrary_bytes_are_read_as_protobuf_reads_them_or_refused(message: bytes) -> None:
    with contextlib.suppress(DecodeError):
        expected = pb.ReadReply.FromString(message)
        piece = decode_read_reply(message)
        assert (piece.range, bytes(piece.data), piece.status) == (
            expected.range,
            expected.data,
            expected.status,
        )
    with contextlib.suppress(DecodeError):
        expected_step = pb.PutRequest.FromString(message)
        step = decode_put_request(message)
        assert (pb.PutRequest(data=bytes(step)) if isinstance(step, memoryview) else step) == expected_step


def test_the_payload_is_not_copied() -> None:
    message = encode_read_piece(3, [memoryview(b"abcd")])
    assert decode_read_reply(message).data.obj is message
    put = encode_put_request(memoryview(b"abcd"))
    step = decode_put_request(put)
    assert isinstance(step, memoryview)
    assert step.obj is put
