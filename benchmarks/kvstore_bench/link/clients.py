"""The client of a policy, with the stages of a fetch overlapping as in the product, or one after the other."""

from collections.abc import Mapping
from typing import Any

from kvstore_client import ClientSettings, KVStoreClient, connect
from kvstore_client.fetch.restore import DecodedFrames, Restorer
from kvstore_codec.decoding import FramesTogether


class SerialRestorer(Restorer):
    """Receives all, then decodes all, then restores all: shows what overlapping the stages saves."""

    def run(self) -> None:
        decoded: list[DecodedFrames] = []
        with self.failing_unfinished(decoded):
            for item in list(self.receiver.out):
                together, batch = FramesTogether(), len(decoded)
                self.decode(item, together, decoded)
                self.finish_decode(together, decoded[batch:])
            self.restore_all(decoded)


def connect_policy(address: str, settings: Mapping[str, Any]) -> KVStoreClient:
    """`settings` are those of `connect`, and `pipelined`: whether the stages of a fetch overlap. Where they do
    not, nothing is planned again while it fetches."""
    fields = {name: value for name, value in settings.items() if name != "pipelined"}
    if settings.get("pipelined", True):
        return connect(address, **fields)
    return KVStoreClient(ClientSettings(**fields | {"address": address, "replan": False}), SerialRestorer)
