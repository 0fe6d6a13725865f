"""What holds for every way to a storage node's KV bytes."""

import threading
import time
from collections.abc import Iterator

import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.transport import GrpcTransport, Transport
from kvstore_codec.errors import TransferError
from tests.client.transport.conftest import (
    END,
    REVOKE,
    Files,
    Served,
    data,
    read_request,
    start,
    steps,
    wait_until,
)
from tests.sample_chunk import SampleChunk, sample_chunk


@pytest.fixture(params=["grpc", "bulk", "bulk over TLS"])
def either(request: pytest.FixtureRequest) -> Iterator[tuple[Served, Transport]]:
    tls = request.getfixturevalue("tls_files") if request.param == "bulk over TLS" else None
    assert tls is None or isinstance(tls, Files)
    served = Served(tls)
    yield served, served.over_grpc() if request.param == "grpc" else served.over_bulk()
    served.close()


def put(transport: Transport, *chunks: SampleChunk) -> list[int]:
    return [reply.status for reply in transport.put(steps(*chunks), 60)]


def read(
    transport: Transport, chunks: list[SampleChunk], ranges: list[tuple[int, int, int]]
) -> dict[int, bytes]:
    parts: dict[int, bytes] = {}
    for piece in transport.read(read_request(chunks, ranges), 10):
        assert list(parts) == sorted(parts)
        if piece.status == pb.READ_STATUS_OK:
            parts[piece.range] = parts.get(piece.range, b"") + piece.data
        else:
            parts[piece.range] = pb.ReadStatus.Name(piece.status).encode()
    return parts


def test_what_was_put_is_read(either: tuple[Served, Transport]) -> None:
    _, transport = either
    small, large = sample_chunk(content=1), sample_chunk(content=2, frame_bytes=300_000)
    assert put(transport, small, large) == [pb.PUT_STATUS_STORED] * 2
    assert put(transport, large, small) == [pb.PUT_STATUS_ALREADY_STORED] * 2
    frames = small.header.geometry.frame_count
    ranges = [(1, 0, frames), (0, 2, 1), (1, 3, 2), (0, 0, 0)]
    assert read(transport, [small, large], ranges) == {
        0: large.frames(0, frames),
        1: small.frames(2, 1),
        2: large.frames(3, 2),
        3: small.data,
    }


def test_nothing_may_be_asked_for(either: tuple[Served, Transport]) -> None:
    _, transport = either
    assert put(transport) == []
    assert read(transport, [], []) == {}


def test_ranges_that_cannot_be_read_do_not_stop_the_others(either: tuple[Served, Transport]) -> None:
    _, transport = either
    chunk, missing = sample_chunk(content=1), sample_chunk(content=2)
    put(transport, chunk)
    ranges = [(1, 0, 1), (0, 0, 99), (0, 3, 0), (0, 1 << 31, 1 << 31), (0, 7, 1)]
    assert read(transport, [chunk, missing], ranges) == {
        0: b"READ_STATUS_NOT_FOUND",
        1: b"READ_STATUS_INVALID_RANGE",
        2: b"READ_STATUS_INVALID_RANGE",
        3: b"READ_STATUS_INVALID_RANGE",
        4: chunk.frames(7, 1),
    }


def test_each_chunk_of_a_put_has_its_own_fate(either: tuple[Served, Transport]) -> None:
    served, transport = either
    good, better, flipped = sample_chunk(content=1), sample_chunk(content=2), sample_chunk(content=3)
    damaged = bytearray(flipped.data)
    damaged[-1] ^= 1

    def all_steps() -> Iterator[pb.PutRequest | memoryview]:
        yield from (start(flipped), memoryview(damaged), END)
        yield from (start(flipped), *data(flipped), REVOKE)
        yield from (start(flipped, len(flipped.data) + 1), *data(flipped), END)
        yield from (start(flipped, len(flipped.data) - 1), *data(flipped), END)
        yield from steps(good)
        yield from (start(sample_chunk(content=4), 1 << 40), memoryview(b"x" * 1000), REVOKE)
        yield from steps(better)

    invalid, stored = pb.PUT_STATUS_INVALID, pb.PUT_STATUS_STORED
    statuses = [reply.status for reply in transport.put(all_steps(), 10)]
    refused = statuses.pop(5)
    assert statuses == [invalid, pb.PUT_STATUS_REVOKED, invalid, invalid, stored, stored]
    # Over the bulk port it is revoked before anybody asks what became of it.
    assert refused in (pb.PUT_STATUS_TOO_LARGE, pb.PUT_STATUS_REVOKED)
    assert served.node.stats().chunks == 2


def test_a_chunk_that_does_not_fit_is_refused_and_the_next_one_stored(
    either: tuple[Served, Transport],
) -> None:
    served, transport = either
    huge, small = sample_chunk(content=1, frame_bytes=9 << 20), sample_chunk(content=2)
    assert put(transport, huge, small) == [pb.PUT_STATUS_TOO_LARGE, pb.PUT_STATUS_STORED]
    assert served.node.stats().chunks == 1


def test_a_put_whose_steps_break_off_leaves_nothing(either: tuple[Served, Transport]) -> None:
    served, transport = either
    chunk = sample_chunk()
    stream = transport.put(iter([start(chunk), memoryview(chunk.data)[:100]]), 10)
    if isinstance(transport, GrpcTransport):  # where the end of the steps ends the put
        assert list(stream) == []
    else:
        with pytest.raises(TransferError, match="is cut off"):
            list(stream)
    wait_until(lambda: served.node.stats().bytes_used == 0)


def test_a_put_is_over_in_time_when_its_steps_are_slow(either: tuple[Served, Transport]) -> None:
    served, transport = either
    chunk = sample_chunk()
    timeout_s = 0.3
    deadline_s = time.monotonic() + timeout_s

    def slow() -> Iterator[pb.PutRequest | memoryview]:
        yield start(chunk)
        wait_until(lambda: time.monotonic() > deadline_s + timeout_s)
        yield memoryview(chunk.data)
        yield END

    with pytest.raises(TransferError) as failure:
        list(transport.put(slow(), timeout_s))
    assert failure.value.reason == "timeout"
    wait_until(lambda: served.node.stats().bytes_used == 0)


def test_a_read_can_be_cancelled_from_another_thread(either: tuple[Served, Transport]) -> None:
    served, transport = either
    chunk = sample_chunk(frame_bytes=1 << 20)
    put(transport, chunk)
    stream = transport.read(read_request([chunk], [(0, 0, 8)] * 50), 30)
    pieces = iter(stream)
    next(pieces)
    cancelling = threading.Thread(target=stream.cancel)
    cancelling.start()
    cancelling.join()
    with pytest.raises(TransferError) as failure:
        list(pieces)
    assert failure.value.reason == "cancelled"
    served.node.delete([chunk.chunk_id])
    wait_until(lambda: served.node.stats().bytes_used == 0)
    stream.cancel()


def test_a_put_can_be_cancelled_while_it_waits(either: tuple[Served, Transport]) -> None:
    served, transport = either
    first, second = sample_chunk(content=1), sample_chunk(content=2)
    goes_on = threading.Event()

    def endless() -> Iterator[pb.PutRequest | memoryview]:
        yield from steps(first)
        yield start(second)
        yield memoryview(second.data)[:50]
        goes_on.wait(60)
        yield memoryview(second.data)[50:]
        yield END

    stream = transport.put(endless(), 30)
    timer = threading.Timer(0.2, lambda: (stream.cancel(), goes_on.set()))
    timer.start()
    with pytest.raises(TransferError) as failure:
        list(stream)
    assert failure.value.reason == "cancelled"
    timer.join()
    wait_until(lambda: served.node.stats().bytes_used <= 1 << 16)
    assert served.node.stats().chunks <= 1


def test_nobody_there(either: tuple[Served, Transport]) -> None:
    served, transport = either
    served.grpc.stop(0)
    served.bulk.stop(0)
    for messages in (
        transport.read(read_request([sample_chunk()], [(0, 0, 1)]), 5),
        transport.put(steps(sample_chunk()), 5),
    ):
        with pytest.raises(TransferError) as failure:
            list(messages)
        assert failure.value.reason == "unreachable"


def test_several_threads_use_one_transport(either: tuple[Served, Transport]) -> None:
    _, transport = either
    chunks = [sample_chunk(content=i, frame_bytes=20_000) for i in range(8)]
    wrong: list[int] = []

    def use(index: int) -> None:
        for _ in range(3):
            put(transport, chunks[index])
            if read(transport, [chunks[index]], [(0, 0, 0)]) != {0: chunks[index].data}:
                wrong.append(index)

    threads = [threading.Thread(target=use, args=(index,)) for index in range(len(chunks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
