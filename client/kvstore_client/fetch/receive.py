"""Receive stage: frame ranges from one owner, as they come off the wire."""

from collections.abc import Sequence

import grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import StorageStub
from kvstore_client.fetch.base import ReadTask, ReceivedFrames
from kvstore_client.fetch.deliver import Delivery
from kvstore_client.fetch.plan import RANGE_BYTES
from kvstore_client.fetch.queue import StageQueue


def receive(
    stub: StorageStub, tasks: Sequence[ReadTask], delivery: Delivery, out: StageQueue[ReceivedFrames]
) -> None:
    """Read `tasks` from one owner in one stream and pass each on when it is complete.

    A chunk that the owner no longer has is reported missing and the others go on; when the stream breaks, every
    chunk it still owed is missing. Returns early when the fetch is over.
    """
    timeline = delivery.timeline
    call = stub.Read(_request(tasks), timeout=delivery.remaining_s())
    delivery.on_end(call.cancel)
    done = 0
    try:
        parts: list[memoryview] = []
        received = 0
        start_s = timeline.now_s()
        for reply in call:
            if reply.range != done or (len(reply.data) == 0 and reply.status == pb.READ_STATUS_OK):
                delivery.fail_chunks(tasks[done:], "protocol")
                return
            task = tasks[done]
            delivery.progress(len(reply.data))
            if reply.status != pb.READ_STATUS_OK:
                delivery.fail_chunks([task], "gone")
            else:
                parts.append(reply.data)
                received += len(reply.data)
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
    except grpc.RpcError as error:
        delivery.fail_chunks(tasks[done:], _reason(error))
    finally:
        call.cancel()
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


def _reason(error: grpc.RpcError) -> str:
    code = error.code()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return "timeout"
    if code == grpc.StatusCode.UNAVAILABLE:
        return "unreachable"
    return f"rpc_{code.name.lower()}"
