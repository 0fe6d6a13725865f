"""What the bulk port answers, also to clients that are malformed or hostile."""

import contextlib
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_api.frames import FrameKind, pack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from tests.sample_chunk import sample_chunk
from tests.service.bulk_port import CHUNK, Port, answer, put_frame, read_frame, ref, reply


def test_requests_may_follow_each_other_without_waiting(port: Port) -> None:
    other = sample_chunk(content=1)
    with port.connected() as connected:
        puts = put_frame() + CHUNK.data + put_frame(other) + other.data + put_frame() + CHUNK.data
        connected.sendall(puts + read_frame())
        statuses = [reply(connected).status for _ in range(3)]
        assert statuses == [pb.PUT_STATUS_STORED, pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED]
        assert answer(connected) == (FrameKind.RANGE, CHUNK.data)


@pytest.mark.parametrize(
    ("request_bytes", "reason"),
    [
        (pack_header(FrameKind.RANGE, 0), "READ or PUT"),
        (pack_header(FrameKind.READ, 1 << 62), "at most"),
        (pack_header(FrameKind.PUT, 1 << 30), "at most"),
        (pack_header(FrameKind.READ, 3) + b"\xff\xff\xff", "not a ReadRequest"),
        (pack_header(FrameKind.PUT, 3) + b"\xff\xff\xff", "not a PutStart"),
        (pack_header(FrameKind.PUT, 0), "32 bytes"),
        (pack_header(FrameKind.READ, 8 << 20) + b"\x0a\x00" * (4 << 20), "more than 393216"),
        (pack_header(FrameKind.READ, 2 << 20) + b"\x82\xff\xff\x7f" * (1 << 19), "not a ReadRequest"),
        (read_frame(encodings=["another"]), "one for each"),
        (read_frame(ranges=[pb.ReadRange(chunk=1)]), "beyond"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_a_reason(
    port: Port, request_bytes: bytes, reason: str
) -> None:
    with port.connected() as connected:
        connected.sendall(put_frame() + CHUNK.data)
        assert reply(connected).status == pb.PUT_STATUS_STORED
        connected.sendall(request_bytes)
        kind = FrameKind.RANGE
        while kind == FrameKind.RANGE:
            kind, message = answer(connected)
        assert kind == FrameKind.REFUSED
        assert reason in message.decode()
        assert connected.recv(1) == b""


def test_another_protocol_is_told_where_it_is(port: Port) -> None:
    with port.connected(b"GET / HTTP/1.1\r\n\r\n") as connected:
        kind, message = answer(connected)
    assert kind == FrameKind.REFUSED
    assert b"bulk port" in message


@given(st.binary(max_size=300))
def test_noise_is_survived(noise: bytes) -> None:
    with shared().connected() as connected:
        connected.sendall(noise)
        connected.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while connected.recv(4096):
                pass
    with shared().connected() as connected:
        connected.sendall(put_frame() + CHUNK.data)
        assert reply(connected).status in (pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED)


_shared: list[Port] = []


def shared() -> Port:
    if not _shared:
        _shared.append(Port(patience_s=1.0))
    return _shared[0]


@pytest.fixture(scope="module", autouse=True)
def _stop_shared() -> Iterator[None]:
    yield
    for port in _shared:
        port.server.stop(0)
        port.node.check_integrity()


def test_chunks_that_are_not_stored_are_answered_and_skipped(port: Port) -> None:
    damaged = bytearray(CHUNK.data)
    damaged[-1] ^= 1
    unknown = pb.PutStart(chunk=ref(CHUNK), encoding="exact-magic", size_bytes=9).SerializeToString()
    with port.connected() as connected:
        connected.sendall(put_frame() + damaged)
        assert reply(connected).status == pb.PUT_STATUS_INVALID
        connected.sendall(pack_header(FrameKind.PUT, len(unknown)) + unknown + b"123456789")
        refusal = reply(connected)
        assert (refusal.status, "exact-magic" in refusal.message) == (pb.PUT_STATUS_INVALID, True)
        connected.sendall(put_frame(size_bytes=0))
        assert reply(connected).status == pb.PUT_STATUS_INVALID
        connected.sendall(put_frame(size_bytes=100 << 20) + bytes(100 << 20))
        assert reply(connected).status == pb.PUT_STATUS_TOO_LARGE
        connected.sendall(put_frame() + CHUNK.data)
        assert reply(connected).status == pb.PUT_STATUS_STORED
