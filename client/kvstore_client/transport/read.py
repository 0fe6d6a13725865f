"""Reads over the bulk port."""

from collections.abc import Iterator
from typing import cast

from kvstore_api.bulk import ReadPiece
from kvstore_api.frames import FrameHeader, FrameKind, pack_bits, pack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.transport.base import Memory, Places
from kvstore_client.transport.exchange import Exchange
from kvstore_client.transport.memory import LARGEST_BYTES
from kvstore_codec.errors import TransferError


def read_ranges(exchange: Exchange, request: pb.ReadRequest, memory: Memory) -> Iterator[ReadPiece]:
    """Each range in one piece, or in several if it has more than LARGEST_BYTES. The node sends only as fast as the
    caller iterates."""
    count = len(request.ranges)
    if not count:
        exchange.complete()
        return
    exchange.rest(resting=False)
    header = _ask(exchange, request, FrameKind.RANGE)
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


def read_any_order(exchange: Exchange, request: pb.ReadRequest, places: Places) -> Iterator[ReadPiece]:
    """Each range in one piece, in the order in which the node sends them. Between two ranges the node is told which
    ones are cancelled; an older node is not, which answers with RANGE."""
    count = len(request.ranges)
    if not count:
        exchange.complete()
        return
    unseen, unwanted = set(range(count)), set[int]()
    exchange.rest(resting=False)
    header = _ask(exchange, request, FrameKind.FRAMES, FrameKind.RANGE)
    kind = FrameKind(header.kind)
    while True:
        index = header.range_index
        if index not in unseen:
            raise exchange.misunderstood(f"range {index}, which was not expected")
        unseen.remove(index)
        data = memoryview(b"")
        if header.status == pb.READ_STATUS_OK:
            data = places.place(index, header.length)
            with exchange.staying(anew=False):
                exchange.receive_into(data)
        elif header.length or header.status not in pb.ReadStatus.values():
            raise exchange.misunderstood(f"a range of status {header.status} and {header.length} bytes")
        if not unseen:
            exchange.complete()
        yield ReadPiece(index, data, cast("pb.ReadStatus", header.status))
        del data
        if not unseen:
            return
        cancelled = unseen.intersection(places.cancelled())
        if kind == FrameKind.FRAMES and cancelled:
            bitmap = pack_bits(cancelled)
            exchange.send([pack_header(FrameKind.CANCEL, len(bitmap)), bitmap])
        unwanted |= cancelled
        if kind == FrameKind.RANGE and unseen <= unwanted:
            raise TransferError("cancelled", "the node cannot be told that nothing more is wanted")
        with exchange.staying(anew=False):
            header = exchange.receive_header(kind)


def _ask(exchange: Exchange, request: pb.ReadRequest, *kinds: FrameKind) -> FrameHeader:
    """Send the request and wait for the first answer; try once more if a reused connection had ended unnoticed."""
    message = request.SerializeToString()
    question = [pack_header(FrameKind.READ, len(message)), message]
    try:
        with exchange.staying(anew=True), exchange.beginning():
            exchange.send(question)
            return exchange.receive_header(*kinds)
    except ConnectionError:
        if not exchange.is_unproven:
            raise
    exchange.open_again()
    with exchange.staying(anew=True), exchange.beginning():
        exchange.send(question)
        return exchange.receive_header(*kinds)
