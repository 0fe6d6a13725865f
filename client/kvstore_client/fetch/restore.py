"""Restore stage: decoded keys get their position."""

from kvstore_client.fetch.base import Destination, ReadTask
from kvstore_codec.rope import rotate_


def restore(task: ReadTask, destination: Destination) -> None:
    """Rotate the keys of a decoded range where they lie."""
    if destination.rotary is not None:
        rotate_(destination.buffers.keys[task.layers, :, task.tokens], destination.rotary.at(task.tokens))
