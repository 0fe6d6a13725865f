"""Decode stage: verified frames become KV in the destination, keys not yet rotated."""

from kvstore_client.fetch.base import Destination, ReadTask, ReceivedFrames
from kvstore_client.fetch.deliver import Delivery
from kvstore_client.fetch.queue import StageQueue
from kvstore_codec.codec import decode_frame
from kvstore_codec.errors import ChecksumError, CodecError


def decode(
    received: StageQueue[ReceivedFrames],
    destination: Destination,
    delivery: Delivery,
    out: StageQueue[ReadTask],
) -> None:
    """Decode until nothing more is received. A chunk with one bad frame is missing as a whole."""
    try:
        for item in received:
            task = item.task
            try:
                with delivery.timeline.span("decode", task.label):
                    _decode_range(item, destination)
            except CodecError as error:
                reason = "checksum" if isinstance(error, ChecksumError) else "undecodable"
                delivery.fail_chunks([task], reason)
                continue
            if not out.put(task):
                return
    finally:
        out.close()


def _decode_range(item: ReceivedFrames, destination: Destination) -> None:
    task, header = item.task, item.task.chunk.header
    keys = destination.buffers.keys[task.layers]
    values = destination.buffers.values[task.layers]
    begin = header.frame_offset(task.first_frame)
    for frame in range(task.first_frame, task.first_frame + task.frame_count):
        offset, length = header.range_bytes(frame, 1)
        slot = header.geometry.tokens_of(frame % header.geometry.frames_per_period)
        tokens = slice(task.chunk.first_token + slot.start, task.chunk.first_token + slot.stop)
        decode_frame(
            header,
            frame,
            item.data[offset - begin : offset - begin + length],
            keys[:, :, tokens],
            values[:, :, tokens],
        )
