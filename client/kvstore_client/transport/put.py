"""Puts over the bulk port."""

from collections.abc import Iterator, Sequence
from itertools import chain

from kvstore_api.frames import FrameKind, pack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.transport.exchange import Exchange
from kvstore_codec.errors import TransferError

# Maximum number of unanswered chunks while the next one is encoded.
_MOST_UNANSWERED = 8
# Smaller pieces are collected up to this size before they are sent.
_SEND_BYTES = 4 << 20
Step = pb.PutRequest | memoryview


class Steps:
    """The steps of a put. Keeps consumed steps until a chunk is answered, so that they can be repeated by `again`."""

    def __init__(self, steps: Iterator[Step]) -> None:
        self._steps = steps
        self._taken: list[Step] | None = []

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        step = next(self._steps)
        if self._taken is not None:
            self._taken.append(step)
        return step

    def answered(self) -> None:
        self._taken = None

    def again(self) -> Iterator[Step]:
        taken, self._taken = self._taken, None
        return chain(taken or (), self._steps)


def put_chunks(exchange: Exchange, steps: Steps) -> Iterator[pb.PutReply]:
    """Send the chunks and yield their replies. Sends up to _SEND_BYTES at once, and all of a chunk before the chunk's
    end is consumed.

    A chunk that is revoked, or does not have its announced size, costs the connection: that tells the node not to store
    it.
    """
    unanswered = 0
    for start in steps:
        exchange.rest(resting=False)
        fate = _send_chunk(exchange, start, steps)
        unanswered += fate is None
        while unanswered > (0 if fate else _MOST_UNANSWERED - 1):
            unanswered -= 1
            yield _reply(exchange, steps, last=not unanswered)
        if fate is not None:
            exchange.break_off()
            steps.answered()
            yield fate
    while unanswered:
        unanswered -= 1
        yield _reply(exchange, steps, last=not unanswered)
    exchange.complete()


def _send_chunk(exchange: Exchange, first: Step, steps: Iterator[Step]) -> pb.PutReply | None:
    """Consume and send a chunk's steps. Returns None when the chunk was sent, else the reply in place of the node's."""
    if isinstance(first, memoryview) or first.WhichOneof("step") != "start":
        raise TransferError("protocol", "a put begins with a start step")
    message: bytes = first.start.SerializeToString()
    waiting: list[memoryview | bytes] = [pack_header(FrameKind.PUT, len(message)), message]
    waiting_bytes = 0
    left = first.start.size_bytes
    for step in steps:
        kind = "data" if isinstance(step, memoryview) else step.WhichOneof("step")
        if kind == "data":
            data = step if isinstance(step, memoryview) else memoryview(step.data)
            left -= data.nbytes
            if left < 0:
                continue
            waiting.append(data)
            waiting_bytes += data.nbytes
            if waiting_bytes >= _SEND_BYTES:
                _send(exchange, waiting)
                waiting, waiting_bytes = [], 0
        elif kind == "end" and not left:
            if waiting:
                _send(exchange, waiting)
            return None
        elif kind == "end":
            came = first.start.size_bytes - left
            reason = f"the chunk was announced with {first.start.size_bytes} bytes, but has {came}"
            return pb.PutReply(status=pb.PUT_STATUS_INVALID, message=reason)
        elif kind == "revoke":
            return pb.PutReply(status=pb.PUT_STATUS_REVOKED)
        else:
            break
    raise TransferError(
        "protocol", "a put consists of start, data..., and end or revoke; this one is cut off"
    )


def _send(exchange: Exchange, views: Sequence[memoryview | bytes]) -> None:
    """Send, and try once more if a reused connection had ended unnoticed."""
    if not exchange.is_open:
        exchange.open()
    try:
        with exchange.staying(anew=True), exchange.beginning():
            exchange.send(views)
    except ConnectionError:
        if not exchange.is_unproven:
            raise
        exchange.open_again()
        with exchange.staying(anew=True), exchange.beginning():
            exchange.send(views)
    exchange.proven()


def _reply(exchange: Exchange, steps: Steps, *, last: bool) -> pb.PutReply:
    with exchange.staying(anew=False), exchange.beginning():
        message = exchange.receive_message(exchange.receive_header(FrameKind.PUT_REPLY))
    steps.answered()
    reply = pb.PutReply.FromString(message)
    exchange.rest(resting=last)
    return reply
