"""Generations of the canaries of a process that compares nothing itself, but names chunks."""

import threading

from kvstore_client.canaries import Verdict
from kvstore_client.client import KVStoreClient
from kvstore_codec.errors import NodeUnavailableError
from kvstore_codec.model_spec import ModelSpec


class Generation:
    """Follows the generation of one model's canary. Used by one thread, which waits for nothing but in `require`."""

    def __init__(self, client: KVStoreClient, spec: ModelSpec) -> None:
        self._client, self._spec = client, spec
        self._changes: int | None = None
        """Value of `Canaries.changes` that the known generation belongs to."""
        self._asking: threading.Thread | None = None

    def current(self) -> int:
        """The generation as it is known; asks for it in the background where it may have changed."""
        canaries = self._client.canaries
        is_asking = self._asking is not None and self._asking.is_alive()
        if self._changes != canaries.changes and not is_asking and not canaries.is_paused(self._spec):
            self._ask()
        return canaries.generation(self._spec.digest)

    def require(self) -> None:
        """Ask for the generation if it was never asked for. Waits for the coordinator, in any thread. Raises
        NodeUnavailableError: until the generation is known, chunks are named as under the model's first canary, and
        those that are found may be the ones for which it was replaced."""
        if self._changes is None:
            self._changes = self._client.canaries.follow(self._spec)

    def _ask(self) -> None:
        thread = threading.Thread(target=self._follow, name="kvstore-generation", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread left; tried again
            return
        self._asking = thread

    def _follow(self) -> None:
        try:
            self._changes = self._client.canaries.follow(self._spec)
        except NodeUnavailableError as error:
            self._client.canaries.note(self._spec, Verdict("unreachable", str(error)))
