"""Restore stage: decoded keys get their position."""

from kvstore_client.fetch.base import Destination, ReadTask
from kvstore_codec.rope import rotate_


def restore(task: ReadTask, destination: Destination) -> None:
    """Rotate the keys of a decoded range where they lie."""
    if destination.rotary is not None:
        for layer in range(task.layers.start, task.layers.stop):
            table = destination.rotary[layer].at(task.tokens)
            rotate_(destination.buffers.keys[layer, :, task.tokens], table)
