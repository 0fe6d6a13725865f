"""Receive stage: frame ranges from one owner, as they come off the wire."""

from collections.abc import Sequence

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.fetch.base import ReadTask, ReceivedFrames
from kvstore_client.fetch.deliver import Delivery
from kvstore_client.fetch.plan import RANGE_BYTES
from kvstore_client.fetch.queue import StageQueue
from kvstore_client.transport import Transport
from kvstore_codec.errors import TransferError


def receive(
    transport: Transport, tasks: Sequence[ReadTask], delivery: Delivery, out: StageQueue[ReceivedFrames]
) -> None:
    """Read `tasks` from one owner in one stream and pass each on when it is complete.

    A chunk that the owner no longer has is reported missing and the others go on; when the stream breaks, every
    chunk it still owed is missing. Returns early when the fetch is over.
    """
    timeline = delivery.timeline
    stream = transport.read(_request(tasks), delivery.remaining_s())
    delivery.on_end(stream.cancel)
    done = 0
    try:
        parts: list[memoryview] = []
        received = 0
        start_s = timeline.now_s()
        for piece in stream:
            if piece.range != done or (len(piece.data) == 0 and piece.status == pb.READ_STATUS_OK):
                delivery.fail_chunks(tasks[done:], "protocol")
                return
            task = tasks[done]
            delivery.progress(len(piece.data))
            if piece.status != pb.READ_STATUS_OK:
                delivery.fail_chunks([task], "gone")
            else:
                parts.append(piece.data)
                received += len(piece.data)
                if received < task.size_bytes:
                    continue
                if received > task.size_bytes:
                    delivery.fail_chunks(tasks[done:], "protocol")
                    return
                data = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
                timeline.add("receive", start_s, timeline.now_s(), task.label)
                if not out.put(ReceivedFrames(task, data), len(data)):
                    return
            parts, received = [], 0
            done += 1
            start_s = timeline.now_s()
        delivery.fail_chunks(tasks[done:], "protocol")
    except TransferError as error:
        delivery.fail_chunks(tasks[done:], error.reason)
    finally:
        stream.cancel()
        out.close()


def _request(tasks: Sequence[ReadTask]) -> pb.ReadRequest:
    request = pb.ReadRequest(piece_bytes=RANGE_BYTES)
    positions: dict[int, int] = {}
    for task in tasks:
        if task.chunk_index not in positions:
            positions[task.chunk_index] = len(positions)
            chunk_id = task.chunk.chunk_id
            request.chunks.add(content_id=chunk_id.content_id, prefix_id=chunk_id.prefix_id)
            request.encodings.append(task.chunk.header.encoding.name)
        request.ranges.add(
            chunk=positions[task.chunk_index], first_frame=task.first_frame, frame_count=task.frame_count
        )
    return request
