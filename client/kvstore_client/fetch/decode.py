"""Decode stage: verified frames become KV in the destination, keys not yet rotated."""

from kvstore_client.fetch.base import Destination, ReceivedFrames
from kvstore_codec.codec import decode_frame


def decode(item: ReceivedFrames, destination: Destination) -> None:
    """Raises CodecError for a frame that is not what its header says; the destination is then partly written."""
    task, header = item.task, item.task.chunk.header
    keys = destination.buffers.keys[task.layers]
    values = destination.buffers.values[task.layers]
    begin = header.frame_offset(task.first_frame)
    for frame in range(task.first_frame, task.first_frame + task.frame_count):
        offset, length = header.range_bytes(frame, 1)
        slot = header.geometry.tokens_of(frame % header.geometry.frames_per_period)
        tokens = slice(task.chunk.first_token + slot.start, task.chunk.first_token + slot.stop)
        data = item.data[offset - begin : offset - begin + length]
        decode_frame(header, frame, data, keys[:, :, tokens], values[:, :, tokens])
