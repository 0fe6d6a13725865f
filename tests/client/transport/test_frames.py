"""Reads in any order over both ports: in place, cancelled range by range, also from nodes that do not know them."""

import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytest

from kvstore_api.frames import FrameKind, unpack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.transport import BulkTransport, Transport
from kvstore_client.transport.exchange import Exchange
from kvstore_codec.errors import TransferError
from kvstore_service.bulk_server.session import Session
from tests.client.transport.conftest import Files, Served, read_request, steps
from tests.sample_chunk import sample_chunk

CHUNKS = [sample_chunk(content=number, frame_bytes=300_000) for number in range(4)]
RANGES = [(chunk, frame, 1) for chunk in range(len(CHUNKS)) for frame in range(0, 8, 2)]
TIMEOUT_S = 20.0


class Places:
    """New memory for each range. Once range `index` has come, the ranges `cancels[index]` are not wanted any more."""

    def __init__(self, cancels: dict[int, Collection[int]] | None = None) -> None:
        self.placed: dict[int, memoryview] = {}
        self.come: set[int] = set()
        self._cancels = cancels or {}

    def place(self, index: int, size_bytes: int) -> memoryview:
        chunk, first, count = RANGES[index]
        if size_bytes != len(CHUNKS[chunk].frames(first, count)):
            raise TransferError("protocol", "not the size of that range")
        self.placed[index] = memoryview(bytearray(size_bytes))
        return self.placed[index]

    def cancelled(self) -> Collection[int]:
        ready = self.come.intersection(self._cancels)
        return [number for index in ready for number in self._cancels.pop(index)]


@pytest.fixture(params=["plain", "TLS"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    files: Files | None = request.getfixturevalue("tls_files") if request.param == "TLS" else None
    served = Served(files)
    for chunk in CHUNKS:
        list(served.over_bulk().put(steps(chunk), TIMEOUT_S))
    yield served
    served.close()


@pytest.fixture
def bulk(served: Served) -> BulkTransport:
    return served.over_bulk()


def request() -> pb.ReadRequest:
    return read_request(CHUNKS, RANGES)


def bytes_of(index: int) -> bytes:
    chunk, first, count = RANGES[index]
    return CHUNKS[chunk].frames(first, count)


def read(transport: Transport, places: Places) -> dict[int, tuple[int, bytes]]:
    """(status, bytes) of each range."""
    found: dict[int, tuple[int, bytes]] = {}
    for piece in transport.read_frames(request(), TIMEOUT_S, places):
        before = found.get(piece.range, (0, b""))[1]
        found[piece.range] = piece.status, before + bytes(piece.data)
        places.come.add(piece.range)
    assert len(found) == len(RANGES)
    return found


def test_ranges_come_in_their_places(bulk: BulkTransport) -> None:
    places = Places()
    found = read(bulk, places)
    assert all(found[index] == (pb.READ_STATUS_OK, bytes_of(index)) for index in range(len(RANGES)))
    assert all(places.placed[index] == bytes_of(index) for index in range(len(RANGES)))


def test_over_grpc_ranges_come_in_pieces() -> None:
    served = Served()
    for chunk in CHUNKS:
        list(served.over_bulk().put(steps(chunk), TIMEOUT_S))
    found = read(served.over_grpc(), Places())
    assert all(found[index] == (pb.READ_STATUS_OK, bytes_of(index)) for index in range(len(RANGES)))
    with pytest.raises(TransferError, match="nothing more"):
        read(served.over_grpc(), Places({0: range(1, 16)}))
    served.close()


def test_cancelled_ranges_are_not_sent_and_the_connection_stays(
    served: Served, bulk: BulkTransport, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Exchange.send

    def send_and_tell(self: Exchange, views: Sequence[memoryview | bytes]) -> None:
        send(self, views)
        if unpack_header(bytearray(views[0])).kind == FrameKind.CANCEL:
            gate.set()

    monkeypatch.setattr(Exchange, "send", send_and_tell)
    cancelled = [3, 7, *range(9, 16)]
    found = read(bulk, Places({0: cancelled}))
    for index, (status, data) in found.items():
        if index in cancelled:
            assert (status, data) == (pb.READ_STATUS_CANCELLED, b"")
        else:
            assert (status, data) == (pb.READ_STATUS_OK, bytes_of(index))
    assert served.node.stats().counters["ranges_dropped"] == len(cancelled)
    idle = list(bulk._connections._idle)
    again = read(bulk, Places())
    assert again[3] == (pb.READ_STATUS_OK, bytes_of(3))
    assert list(bulk._connections._idle) == idle
    assert len(idle) == 1


def test_a_cancellation_that_comes_too_late_harms_nothing(bulk: BulkTransport) -> None:
    """The node has sent everything by then, and meets it before the next request."""
    places = Places({index: range(16) for index in range(16)})
    found = read(bulk, places)
    assert all(data in (b"", bytes_of(index)) for index, (_, data) in found.items())
    again = read(bulk, Places())
    assert all(again[index] == (pb.READ_STATUS_OK, bytes_of(index)) for index in range(len(RANGES)))


def test_a_chunk_that_is_gone_costs_its_own_ranges(served: Served, bulk: BulkTransport) -> None:
    served.node.delete([CHUNKS[2].chunk_id])
    found = read(bulk, Places())
    for index, (status, data) in found.items():
        gone = RANGES[index][0] == 2
        assert status == (pb.READ_STATUS_NOT_FOUND if gone else pb.READ_STATUS_OK)
        assert data == (b"" if gone else bytes_of(index))


def test_an_older_node_sends_ranges_in_order_and_is_left_when_nothing_is_wanted(
    bulk: BulkTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Session._send_ranges

    def as_before(self: Session, request: pb.ReadRequest, *arguments: Any) -> None:
        request.ClearField("any_order")
        send(self, request, *arguments)

    monkeypatch.setattr(Session, "_send_ranges", as_before)
    found = read(bulk, Places({0: [5]}))
    assert list(found) == list(range(len(RANGES)))
    assert all(data == bytes_of(index) for index, (_, data) in found.items())
    with pytest.raises(TransferError) as error:
        read(bulk, Places({2: range(16)}))
    assert error.value.reason == "cancelled"
    assert len(read(bulk, Places())) == len(RANGES)


def test_a_range_of_another_size_ends_the_read(served: Served, bulk: BulkTransport) -> None:
    """The node has another chunk under this name than the client expects."""
    wrong = request()
    wrong.ranges[4].frame_count = 2
    with pytest.raises(TransferError, match="size"):
        list(bulk.read_frames(wrong, TIMEOUT_S, Places()))
    assert len(read(bulk, Places())) == len(RANGES)
    assert served.node.stats().leases == 0


def test_nothing_is_read_when_nothing_is_asked(bulk: BulkTransport) -> None:
    assert not list(bulk.read_frames(pb.ReadRequest(), TIMEOUT_S, Places()))


def test_a_read_ends_at_its_deadline(bulk: BulkTransport, gate: threading.Event) -> None:
    with pytest.raises(TransferError) as error:
        list(bulk.read_frames(request(), 0.5, Places()))
    assert error.value.reason == "timeout"
    gate.set()


class Gated:
    """The ranges of a read, where those behind the first one wait for the event."""

    def __init__(self, read: Any, gate: threading.Event) -> None:
        self._read, self._gate = read, gate
        self.drop = read.drop

    def __enter__(self) -> "Gated":
        self._read.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._read.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        for number, data in enumerate(self._read):
            if number == 1:
                assert self._gate.wait(TIMEOUT_S)
            yield data


@pytest.fixture
def gate(served: Served, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The node sends one range, and the others when the event is set."""
    gate, read_frames = threading.Event(), served.node.read_frames
    monkeypatch.setattr(served.node, "read_frames", lambda *arguments: Gated(read_frames(*arguments), gate))
    return gate
