"""Restore stage: decoded keys get their position, and the frames are handed over."""

from kvstore_client.fetch.base import Destination, ReadTask
from kvstore_client.fetch.deliver import Delivery
from kvstore_client.fetch.queue import StageQueue
from kvstore_codec.rope import rotate_


def restore(decoded: StageQueue[ReadTask], destination: Destination, delivery: Delivery) -> None:
    """Rotate the keys of each decoded range where they lie, and deliver it."""
    for task in decoded:
        if destination.rotary is not None:
            with delivery.timeline.span("restore", task.label):
                keys = destination.buffers.keys[task.layers, :, task.tokens]
                rotate_(keys, destination.rotary.at(task.tokens))
        delivery.deliver(task)
