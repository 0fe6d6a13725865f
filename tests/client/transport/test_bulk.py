"""What only the bulk port has: connections that are kept, memory that is used again, a fallback, TLS."""

import gc
import itertools
import socket
import threading
import time

import numpy as np
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.transport import BulkTransport, Connections, ReceiveMemory, Transport
from kvstore_client.transport.memory import LARGEST_BYTES
from kvstore_codec.errors import TransferError
from tests.client.transport.conftest import HOST, Files, Served, read_request, steps
from tests.sample_chunk import sample_chunk

CHUNK = sample_chunk(frame_bytes=100_000)


def whole(transport: Transport) -> bytes:
    return b"".join(piece.data for piece in transport.read(read_request([CHUNK], [(0, 0, 0)]), 5))


def stored(transport: Transport) -> list[int]:
    return [reply.status for reply in transport.put(steps(CHUNK), 5)]


def test_a_connection_is_used_again(served: Served) -> None:
    transport = served.over_bulk()
    stored(transport)
    first = list(served.bulk._connections)
    for _ in range(5):
        assert whole(transport) == CHUNK.data
    # A reader that knows when to stop asking leaves it usable, too.
    stream = transport.put(steps(CHUNK), 5)
    replies = iter(stream)
    assert next(replies).status == pb.PUT_STATUS_ALREADY_STORED
    stream.cancel()
    assert whole(transport) == CHUNK.data
    assert list(served.bulk._connections) == first
    assert len(first) == 1


def test_an_answer_that_is_not_read_costs_the_connection_only(served: Served) -> None:
    transport = served.over_bulk()
    stored(transport)
    stream = transport.read(read_request([CHUNK], [(0, 0, 1), (0, 1, 1)]), 5)
    assert next(iter(stream)).data == CHUNK.frames(0, 1)
    stream.cancel()
    assert whole(transport) == CHUNK.data


@pytest.mark.parametrize("first", ["read", "put"])
def test_a_restarted_server_is_found_again_at_once(served: Served, first: str) -> None:
    transport = served.over_bulk()
    stored(transport)
    port = int(served.bulk.address.rpartition(":")[2])
    served.bulk.stop(0)
    served.serve_bulk(port)
    if first == "read":
        assert whole(transport) == CHUNK.data
    else:
        assert stored(transport) == [pb.PUT_STATUS_ALREADY_STORED]


def test_a_connection_that_ended_unnoticed_is_replaced(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore_api.byte_stream.ByteStream.has_ended", lambda _: False)
    transport = served.over_bulk()
    stored(transport)
    port = int(served.bulk.address.rpartition(":")[2])
    served.bulk.stop(0)
    served.serve_bulk(port)
    assert whole(transport) == CHUNK.data


def test_without_a_bulk_port_grpc_does_the_work(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.bulk.stop(0)
    transport = served.over_bulk(fallback=served.over_grpc())
    assert stored(transport) == [pb.PUT_STATUS_STORED]
    assert whole(transport) == CHUNK.data
    assert caplog.text.count("gRPC is used") == 1


def test_a_fallback_can_be_cancelled(served: Served) -> None:
    served.bulk.stop(0)
    transport = served.over_bulk(fallback=served.over_grpc())
    stored(transport)
    stream = served.over_bulk(served.over_grpc()).read(read_request([CHUNK], [(0, 0, 0)] * 200), 5)
    with pytest.raises(TransferError) as failure:
        sum(1 for _ in stream if stream.cancel() is None)
    assert failure.value.reason == "cancelled"


def test_a_cancelled_stream_does_not_begin(served: Served) -> None:
    stream = served.over_bulk().read(read_request([CHUNK], [(0, 0, 0)]), 5)
    stream.cancel()
    with pytest.raises(TransferError) as failure:
        list(stream)
    assert failure.value.reason == "cancelled"


def test_a_foreign_certificate_is_not_trusted_and_nothing_goes_over_grpc(
    served: Served, tls_files: Files
) -> None:
    secret = Served(tls_files)
    host, _, port = secret.bulk.address.rpartition(":")
    import ssl

    stranger = BulkTransport(Connections(host, int(port), ssl.create_default_context, HOST), ReceiveMemory())
    with pytest.raises(TransferError) as failure:
        list(stranger.put(steps(CHUNK), 5))
    assert failure.value.reason == "tls"
    assert secret.node.stats().chunks == 0
    secret.close()


def test_data_stays_while_it_is_referred_to_and_its_memory_comes_back() -> None:
    memory = ReceiveMemory()
    first = memory.take(100_000)
    first[:] = b"a" * 100_000
    part = first[500:600]
    address = np.frombuffer(first, np.uint8).ctypes.data
    del first
    other = memory.take(100_000)
    other[:] = b"b" * 100_000
    assert part == b"a" * 100
    del part
    gc.collect()
    again = memory.take(70_000)
    assert np.frombuffer(again, np.uint8).ctypes.data == address
    assert len(again) == 70_000


@pytest.mark.parametrize("size_bytes", [0, 1, 1000, 32 << 10, 64 << 10, (64 << 10) + 1, LARGEST_BYTES])
def test_memory_has_the_size_that_was_asked_for(size_bytes: int) -> None:
    view = ReceiveMemory().take(size_bytes)
    assert (len(view), view.readonly) == (size_bytes, False)


def test_a_range_beyond_the_largest_piece_comes_in_several(served: Served) -> None:
    huge = sample_chunk(frame_bytes=3 << 20)
    transport = served.over_bulk()
    assert len(huge.data) > LARGEST_BYTES
    assert [reply.status for reply in transport.put(steps(huge), 10)] == [pb.PUT_STATUS_STORED]
    pieces = [piece.data for piece in transport.read(read_request([huge], [(0, 0, 0)]), 10)]
    assert [len(piece) for piece in pieces] == [LARGEST_BYTES, len(huge.data) - LARGEST_BYTES]
    assert b"".join(pieces) == huge.data


def test_what_is_not_read_is_not_sent(served: Served) -> None:
    transport = served.over_bulk()
    stored(transport)
    stream = iter(transport.read(read_request([CHUNK], [(0, 0, 0)] * 100), 20))
    next(stream)
    time.sleep(0.2)
    assert served.node.stats().counters["bytes_out"] < 10 * len(CHUNK.data)
    assert sum(1 for _ in itertools.islice(stream, 99)) == 99


@pytest.mark.parametrize("first", ["read", "put"])
def test_a_port_that_ends_connections_is_none(served: Served, first: str) -> None:
    """It has too many already, or something else listens there."""
    stored(served.over_grpc())
    with socket.create_server((HOST, 0)) as listener:

        def refuse() -> None:
            connected, _ = listener.accept()
            connected.close()

        thread = threading.Thread(target=refuse)
        thread.start()
        address = f"{HOST}:{listener.getsockname()[1]}"
        transport = served.over_bulk(fallback=served.over_grpc(), address=address)
        if first == "read":
            assert whole(transport) == CHUNK.data
        else:
            assert stored(transport) == [pb.PUT_STATUS_ALREADY_STORED]
        thread.join()


@pytest.mark.parametrize("first", ["read", "put"])
def test_a_port_that_speaks_tls_is_none_for_a_client_that_does_not(tls_files: Files, first: str) -> None:
    secret = Served(tls_files)
    transport = BulkTransport(
        Connections(HOST, int(secret.bulk.address.rpartition(":")[2]), lambda: None, HOST),
        ReceiveMemory(),
        secret.over_grpc(),
    )
    expected = pb.PUT_STATUS_STORED
    if first == "read":
        stored(secret.over_grpc())
        assert whole(transport) == CHUNK.data
        expected = pb.PUT_STATUS_ALREADY_STORED
    assert stored(transport) == [expected]
    transport.close()
    secret.close()


def test_with_tls_nothing_else_is_spoken_where_connections_end(served: Served, tls_files: Files) -> None:
    secret = Served(tls_files)
    with pytest.raises(TransferError):
        stored(secret.over_bulk(address=served.bulk.address))
    assert served.node.stats().chunks == secret.node.stats().chunks == 0
    secret.close()
