"""Reads of single frames at the bulk port, and their cancellation."""

import pytest

from kvstore_api.frames import FrameKind, pack_bits, pack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from tests.service.bulk_port import CHUNK, Port, answer, put_frame, read_frame, reply, wait_until


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
