"""Reused KV that is being fetched, and its buffers."""

import os
from dataclasses import dataclass, field

from kvstore_client.buffers import BufferPool, KVBuffers
from kvstore_client.fetch import Fetch
from kvstore_client.reuse.call import LayerArrives
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import FetchIncompleteError


@dataclass(frozen=True, slots=True)
class IncomingKV:
    """A fetch in progress and its buffers, which it owns until `release`."""

    fetch: Fetch
    buffers: KVBuffers
    _pool: BufferPool
    _process: int = field(default_factory=os.getpid)

    def release(self) -> None:
        """End the fetch and release the buffers. Call it once. A forked child leaves both to the parent."""
        if self._process == os.getpid():
            self.fetch.cancel()
            self._pool.release(self.buffers)


def layers_of(fetch: Fetch, timeline: Timeline) -> LayerArrives:
    """A function that waits for a layer of the fetch and records how long it waited."""

    def arrives(layer: int) -> None:
        with timeline.span("wait", f"layer {layer}"):
            arrived = fetch.wait_layer(layer)
        if not arrived:
            raise FetchIncompleteError(f"layer {layer} will not arrive whole")

    return arrives
