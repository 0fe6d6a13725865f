"""Reads over the bulk port."""

from collections.abc import Iterator
from typing import cast

from kvstore_api.bulk import ReadPiece
from kvstore_api.frames import FrameHeader, FrameKind, pack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.transport.base import Memory
from kvstore_client.transport.exchange import Exchange
from kvstore_client.transport.memory import LARGEST_BYTES


def read_ranges(exchange: Exchange, request: pb.ReadRequest, memory: Memory) -> Iterator[ReadPiece]:
    """Each range in one piece, or in several if it has more than LARGEST_BYTES. The node sends only as fast as the
    caller iterates."""
    count = len(request.ranges)
    if not count:
        exchange.complete()
        return
    exchange.rest(resting=False)
    header = _ask(exchange, request)
    for index in range(count):
        if index:
            with exchange.staying(anew=False):
                header = exchange.receive_header(FrameKind.RANGE)
        if header.range_index != index:
            raise exchange.misunderstood(f"range {header.range_index} instead of {index}")
        last = index == count - 1
        if header.status != pb.READ_STATUS_OK:
            if header.length or header.status not in pb.ReadStatus.values():
                raise exchange.misunderstood(f"a range of status {header.status} and {header.length} bytes")
            if last:
                exchange.complete()
            yield ReadPiece(index, memoryview(b""), cast("pb.ReadStatus", header.status))
            continue
        left = header.length
        while left:
            # Memory is taken only for the next piece, whatever length is announced.
            data = memory.take(min(left, LARGEST_BYTES))
            with exchange.staying(anew=False):
                exchange.receive_into(data)
            left -= len(data)
            if last and not left:
                exchange.complete()
            yield ReadPiece(index, data)
            del data


def _ask(exchange: Exchange, request: pb.ReadRequest) -> FrameHeader:
    """Send the request and wait for the first answer; try once more if a reused connection had ended unnoticed."""
    message = request.SerializeToString()
    question = [pack_header(FrameKind.READ, len(message)), message]
    try:
        with exchange.staying(anew=True), exchange.beginning():
            exchange.send(question)
            return exchange.receive_header(FrameKind.RANGE)
    except ConnectionError:
        if not exchange.is_unproven:
            raise
    exchange.open_again()
    with exchange.staying(anew=True), exchange.beginning():
        exchange.send(question)
        return exchange.receive_header(FrameKind.RANGE)
