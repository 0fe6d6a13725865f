"""The bulk port against clients that are slow, idle, many or gone, and when it stops."""

import contextlib
import socket
import struct
import threading
import time

import pytest

from kvstore_api.frames import MAX_READ_REQUEST_BYTES, FrameKind, pack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_service.bulk_server import session
from kvstore_service.large_requests import SMALL_BYTES
from kvstore_service.listen import Address
from tests.sample_chunk import SampleChunk, sample_chunk
from tests.service.bulk_port import (
    CHUNK,
    Port,
    answer,
    put_frame,
    read_frame,
    ref,
    reply,
    served_port,
    wait_until,
)


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
    with served_port(patience_s=0.3) as port:
        large = stored_large(port)
        with port.connected() as connected:
            connected.sendall(read_frame(50))
            connected.recv(1)
            port.node.delete([large.chunk_id])
            assert port.node.stats().bytes_used > 0
            wait_until(lambda: port.node.stats().bytes_used == 0)


def test_a_writer_that_does_not_write_is_cut_off_and_holds_nothing() -> None:
    with served_port(patience_s=0.3) as port, port.connected() as connected:
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
        wait_until(lambda: len(port.server._connections) == 8 and not port.server._places.idle)
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
    with served_port(idle_s=0.2) as port, port.connected() as connected:
        assert connected.recv(1) == b""


def test_a_client_that_says_nothing_is_not_waited_for() -> None:
    with served_port(patience_s=0.2) as port, port.connected(b"KV") as connected:
        assert connected.recv(1) == b""


def test_beyond_the_limit_the_connection_that_is_idle_longest_is_closed() -> None:
    with served_port(max_connections=2) as port, port.connected() as first, port.connected() as second:
        for connected in (second, first):
            connected.sendall(put_frame() + CHUNK.data)
            reply(connected)
            wait_until(lambda: len(port.server._places.idle) == 2)
        for _ in range(3):
            with port.connected() as third:
                third.sendall(read_frame())
                assert answer(third) == (FrameKind.RANGE, CHUNK.data)
            assert second.recv(1) == b""
            first.sendall(read_frame())
            assert answer(first) == (FrameKind.RANGE, CHUNK.data)
            wait_until(lambda: len(port.server._connections) == len(port.server._places.idle) == 1)


def test_connections_in_service_are_not_closed_for_new_ones() -> None:
    with served_port(max_connections=2) as port, port.connected() as first, port.connected() as second:
        for connected in (first, second):
            connected.sendall(put_frame() + CHUNK.data[:1])
        wait_until(lambda: len(port.server._connections) == 2 and not port.server._places.idle)
        with port.connected() as third:
            kind, text = answer(third)
            assert (kind, b"2 connections" in text) == (FrameKind.REFUSED, True)
        for connected in (first, second):
            connected.sendall(CHUNK.data[1:])
            assert reply(connected).status in (pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED)


def test_stopping_is_prompt_and_gives_requests_under_way_their_time(port: Port) -> None:
    stored_large(port)
    with port.connected() as idle, port.connected() as busy:
        wait_until(lambda: len(port.server._places.idle) == 2)
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
    with served_port(patience_s=60) as port:
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

    def fail_once(connected: socket.socket, peer: Address) -> None:
        if not failed.is_set():
            failed.set()
            raise TypeError("a mistake")
        begin(connected, peer)

    monkeypatch.setattr(port.server, "_begin", fail_once)
    with port.connected() as connected:
        assert failed.wait(60)
    with port.connected() as connected:
        connected.sendall(put_frame() + CHUNK.data)
        assert reply(connected).status == pb.PUT_STATUS_STORED
