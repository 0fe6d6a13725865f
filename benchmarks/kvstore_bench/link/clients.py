"""Makes the client of a policy. The stages of its fetches overlap, or run one after the other for comparison."""

from collections.abc import Mapping
from typing import Any

from kvstore_client import ClientSettings, KVStoreClient, connect
from kvstore_client.fetch.restore import DecodedFrames, Restorer
from kvstore_codec.decoding import FramesTogether


class SerialRestorer(Restorer):
    """Receives everything, then decodes everything, then restores everything. Shows how much time overlapping the
    stages saves."""

    def run(self) -> None:
        decoded: list[DecodedFrames] = []
        with self.failing_unfinished(decoded):
            for item in list(self.receiver.out):
                together, batch = FramesTogether(), len(decoded)
                self.decode(item, together, decoded)
                self.finish_decode(together, decoded[batch:])
            self.restore_all(decoded)


def connect_policy(address: str, settings: Mapping[str, Any]) -> KVStoreClient:
    """Connects a client. `settings` are keyword arguments of `connect`, and `pipelined`: whether the stages of a fetch
    overlap. If they do not, the client does not replan during a fetch."""
    fields = {name: value for name, value in settings.items() if name != "pipelined"}
    if settings.get("pipelined", True):
        return connect(address, **fields)
    return KVStoreClient(ClientSettings(**fields | {"address": address, "replan": False}), SerialRestorer)
