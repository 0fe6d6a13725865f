"""The bulk port against clients that are malformed, hostile, slow or gone."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_api.frames import (
    HEADER_BYTES,
    MAX_READ_REQUEST_BYTES,
    PREFACE,
    FrameKind,
    pack_bits,
    pack_header,
    unpack_header,
)
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.arena import Arena
from kvstore_cluster.node import StorageNode
from kvstore_service.bulk_server import BulkServer, session
from kvstore_service.large_requests import SMALL_BYTES
from kvstore_service.listen import Address
from tests.sample_chunk import SampleChunk, sample_chunk

HOST = "127.0.0.1"
CHUNK = sample_chunk()


class Port:
    def __init__(self, **options: float) -> None:
        self.node = StorageNode("node-0", Arena(64 << 20, 4 << 10))
        self.server = BulkServer(self.node, Address(HOST, 0), **options)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def connected(self, preface: bytes = PREFACE) -> Iterator[socket.socket]:
        host, _, port = self.server.address.rpartition(":")
        with socket.create_connection((host, int(port)), 5) as connected:
            connected.sendall(preface)
            yield connected


@contextlib.contextmanager
def served(**options: float) -> Iterator[Port]:
    port = Port(**options)
    yield port
    port.server.stop(0)
    port.node.check_integrity()
    assert not port.server._connections


@pytest.fixture
def port() -> Iterator[Port]:
    with served() as port:
        yield port


def ref(chunk: SampleChunk) -> pb.ChunkRef:
    return pb.ChunkRef(content_id=chunk.chunk_id.content_id, prefix_id=chunk.chunk_id.prefix_id)


def put_frame(chunk: SampleChunk = CHUNK, size_bytes: int | None = None) -> bytes:
    size_bytes = len(chunk.data) if size_bytes is None else size_bytes
    start = pb.PutStart(chunk=ref(chunk), encoding=chunk.encoding, size_bytes=size_bytes).SerializeToString()
    return pack_header(FrameKind.PUT, len(start)) + start


def read_frame(count: int = 1, **fields: object) -> bytes:
    request = pb.ReadRequest(chunks=[ref(CHUNK)], encodings=[CHUNK.encoding], ranges=[pb.ReadRange()] * count)
    request.MergeFrom(pb.ReadRequest(**fields))  # type: ignore[arg-type]
    message = request.SerializeToString()
    return pack_header(FrameKind.READ, len(message)) + message


def received(connected: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connected.recv(count - len(data))
        assert piece, data
        data += piece
    return data


def answer(connected: socket.socket) -> tuple[int, bytes]:
    """(kind, message) of the next one."""
    header = unpack_header(bytearray(received(connected, HEADER_BYTES)))
    return header.kind, received(connected, header.length)


def reply(connected: socket.socket) -> pb.PutReply:
    kind, message = answer(connected)
    assert kind == FrameKind.PUT_REPLY
    return pb.PutReply.FromString(message)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


def test_a_client_that_goes_away_in_a_put_leaves_nothing(port: Port) -> None:
    with port.connected() as connected:
        connected.sendall(put_frame() + CHUNK.data[:-1])
        wait_until(lambda: port.node.stats().bytes_used > 0)
    wait_until(lambda: port.node.stats().bytes_used == 0)
    assert port.node.stats().chunks == 0


def stored_large(port: Port) -> SampleChunk:
    large = sample_chunk(frame_bytes=2 << 20)
    with port.connected() as connected:
        connected.sendall(put_frame(large) + large.data)
        assert reply(connected).status == pb.PUT_STATUS_STORED
    return large


def test_a_reader_that_does_not_read_is_cut_off_and_holds_nothing() -> None:
    with served(patience_s=0.3) as port:
        large = stored_large(port)
        with port.connected() as connected:
            connected.sendall(read_frame(50))
            connected.recv(1)
            port.node.delete([large.chunk_id])
            assert port.node.stats().bytes_used > 0
            wait_until(lambda: port.node.stats().bytes_used == 0)


def test_a_writer_that_does_not_write_is_cut_off_and_holds_nothing() -> None:
    with served(patience_s=0.3) as port, port.connected() as connected:
        connected.sendall(put_frame() + CHUNK.data[:100])
        wait_until(lambda: port.node.stats().bytes_used > 0)
        wait_until(lambda: port.node.stats().bytes_used == 0)
        assert connected.recv(1) == b""


def test_announced_reads_take_no_place_before_they_come(port: Port) -> None:
    """Nobody else could read much at a time while eight connections had announced 8 MiB each."""
    chunks = [ref(CHUNK)] * 10_000
    large = read_frame(chunks=chunks, encodings=[CHUNK.encoding] * len(chunks))
    assert len(large) > SMALL_BYTES
    with contextlib.ExitStack() as connections:
        for _ in range(8):
            greedy = connections.enter_context(port.connected())
            greedy.sendall(pack_header(FrameKind.READ, MAX_READ_REQUEST_BYTES))
        wait_until(lambda: len(port.server._connections) == 8 and not port.server._idle)
        connected = connections.enter_context(port.connected())
        connected.sendall(put_frame() + CHUNK.data)
        assert reply(connected).status == pb.PUT_STATUS_STORED
        connected.sendall(large)
        assert answer(connected) == (FrameKind.RANGE, CHUNK.data)


def test_a_large_read_has_a_place_for_what_has_come_and_the_rest_must_come_soon(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_REST_S", 0.3)
    kept = port.server._large._kept_bytes
    with port.connected() as connected:
        connected.sendall(pack_header(FrameKind.READ, MAX_READ_REQUEST_BYTES) + bytes(1 << 20))
        wait_until(lambda: kept.total() == 1 << 20)
        wait_until(lambda: kept.total() == 0)
        assert connected.recv(1) == b""


def test_idle_connections_are_closed() -> None:
    with served(idle_s=0.2) as port, port.connected() as connected:
        assert connected.recv(1) == b""


def test_a_client_that_says_nothing_is_not_waited_for() -> None:
    with served(patience_s=0.2) as port, port.connected(b"KV") as connected:
        assert connected.recv(1) == b""


def test_beyond_the_limit_the_connection_that_is_idle_longest_is_closed() -> None:
    with served(max_connections=2) as port, port.connected() as first, port.connected() as second:
        for connected in (second, first):
            connected.sendall(put_frame() + CHUNK.data)
            reply(connected)
            wait_until(lambda: len(port.server._idle) == 2)
        for _ in range(3):
            with port.connected() as third:
                third.sendall(read_frame())
                assert answer(third) == (FrameKind.RANGE, CHUNK.data)
            assert second.recv(1) == b""
            first.sendall(read_frame())
            assert answer(first) == (FrameKind.RANGE, CHUNK.data)
            wait_until(lambda: len(port.server._connections) == len(port.server._idle) == 1)


def test_connections_in_service_are_not_closed_for_new_ones() -> None:
    with served(max_connections=2) as port, port.connected() as first, port.connected() as second:
        for connected in (first, second):
            connected.sendall(put_frame() + CHUNK.data[:1])
        wait_until(lambda: len(port.server._connections) == 2 and not port.server._idle)
        with port.connected() as third, contextlib.suppress(ConnectionError):
            assert third.recv(1) == b""
        for connected in (first, second):
            connected.sendall(CHUNK.data[1:])
            assert reply(connected).status in (pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED)


def test_stopping_is_prompt_and_gives_requests_under_way_their_time(port: Port) -> None:
    stored_large(port)
    with port.connected() as idle, port.connected() as busy:
        wait_until(lambda: len(port.server._idle) == 2)
        busy.sendall(read_frame(1))
        busy.recv(1)
        began = time.monotonic()
        stopping = threading.Thread(target=port.server.stop, args=(60,))
        stopping.start()
        assert idle.recv(1) == b""
        while busy.recv(1 << 20):
            pass
        stopping.join()
        assert time.monotonic() - began < 30, "the grace was waited for"
        with pytest.raises(ConnectionRefusedError), port.connected():
            pass


def test_stopping_cuts_off_what_takes_longer_than_its_grace() -> None:
    with served(patience_s=60) as port:
        stored_large(port)
        with port.connected() as busy:
            busy.sendall(read_frame(100))
            busy.recv(1)
            began = time.monotonic()
            port.server.stop(0.2)
            assert time.monotonic() - began < 30, "the client's patience was waited for"


def test_a_reset_connection_frees_what_it_held(port: Port) -> None:
    with port.connected() as connected:
        connected.sendall(put_frame() + CHUNK.data[:100])
        wait_until(lambda: port.node.stats().bytes_used > 0)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: port.node.stats().bytes_used == 0)


def test_no_request_starts_a_thread(port: Port) -> None:
    """It would be tied to the processor of that request's client."""
    with port.connected() as connected:
        connected.sendall(put_frame() + CHUNK.data)
        reply(connected)
        before = set(threading.enumerate())
        port.node.delete([CHUNK.chunk_id])
        connected.sendall(put_frame() + CHUNK.data)
        reply(connected)
        assert set(threading.enumerate()) <= before


def test_the_port_goes_on_accepting_whatever_went_wrong(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, failed = port.server._begin, threading.Event()

    def fail_once(connected: socket.socket, peer: str) -> None:
        if not failed.is_set():
            failed.set()
            raise TypeError("a mistake")
        begin(connected, peer)

    monkeypatch.setattr(port.server, "_begin", fail_once)
    with port.connected() as connected:
        assert failed.wait(5)
    with port.connected() as connected:
        connected.sendall(put_frame() + CHUNK.data)
        assert reply(connected).status == pb.PUT_STATUS_STORED


def frames_request(count: int) -> bytes:
    return read_frame(0, any_order=True, ranges=[pb.ReadRange(frame_count=1)] * count)


def cancel(*indices: int) -> bytes:
    bitmap = pack_bits(indices)
    return pack_header(FrameKind.CANCEL, len(bitmap)) + bitmap


def test_a_cancellation_outside_a_read_is_ignored(port: Port) -> None:
    with port.connected() as connected:
        connected.sendall(put_frame() + CHUNK.data)
        reply(connected)
        connected.sendall(cancel(0, 9, 60_000) + frames_request(1))
        assert answer(connected) == (FrameKind.FRAMES, CHUNK.frames(0, 1))
        connected.sendall(cancel(0) + read_frame())
        assert answer(connected) == (FrameKind.RANGE, CHUNK.data)


@pytest.mark.parametrize(
    ("request_bytes", "reason"),
    [
        (pack_header(FrameKind.CANCEL, (1 << 13) + 1), "CANCEL"),
        (frames_request((1 << 16) + 1), "65537 ranges"),
        (read_frame(0, any_order=True, ranges=[pb.ReadRange(chunk=1)]), "beyond the 1 chunks"),
    ],
    ids=["a long bitmap", "many ranges", "a chunk that was not named"],
)
def test_requests_for_frames_are_limited(port: Port, request_bytes: bytes, reason: str) -> None:
    with port.connected() as connected:
        connected.sendall(request_bytes)
        kind, message = answer(connected)
        assert kind == FrameKind.REFUSED
        assert reason in message.decode()


def test_during_a_read_of_frames_only_a_cancellation_may_come(port: Port) -> None:
    with port.connected() as connected:
        connected.sendall(put_frame() + CHUNK.data)
        reply(connected)
        connected.sendall(frames_request(60_000) + read_frame())
        while (frame := answer(connected))[0] == FrameKind.FRAMES:
            pass
        assert frame[0] == FrameKind.REFUSED
        assert b"only CANCEL" in frame[1]


def test_a_client_that_goes_during_a_read_of_frames_leaves_nothing(port: Port) -> None:
    with port.connected() as connected:
        connected.sendall(put_frame() + CHUNK.data)
        reply(connected)
        connected.sendall(frames_request(60_000))
        answer(connected)
    wait_until(lambda: not port.server._connections)
    assert port.node.delete([CHUNK.chunk_id]) == 1
    assert port.node.stats().bytes_used == 0
