"""Which chunks of the engine's offloading are stored, asked in the background."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager

from kvstore_client.pages.store import PageStore


class TierLookups(AsyncLookupManager):  # type: ignore[misc]  # vLLM has no types here
    """Asks for the leading run of each request's chunks, and keeps what was found locked until the request is gone.

    Chunks that the engine asks for in one step are looked up together, in the engine's order: of a text whose fifth
    chunk is missing, the sixth is reported missing too.
    """

    def __init__(self, pages: PageStore, tier_type: str) -> None:
        self._pages = pages
        self._locked_by = threading.Lock()
        self._locked: dict[str, list[OffloadKey]] = {}
        """By request; of the requests that the engine has."""
        super().__init__(tier_type)

    def begin(self, request_id: str) -> None:
        """The engine has a request of this id."""
        with self._locked_by:
            self._locked.setdefault(request_id, [])

    def finish(self, request_id: str) -> None:
        """The engine's request is gone: nothing is kept for it."""
        self.cleanup(request_id)
        with self._locked_by:
            locked = self._locked.pop(request_id, [])
        self._pages.unlock(locked)

    def use(self, pages: PageStore) -> None:
        """Ask another store from now on. The one before is closed, and keeps nothing locked."""
        with self._locked_by:
            self._pages = pages
            for locked in self._locked.values():
                locked.clear()

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        """In the background. Waits for the service, `lookup_timeout_s` at most."""
        pages = self._pages
        run = pages.exists(keys)
        with self._locked_by:
            if pages is not self._pages:
                return [False] * len(keys)
            locked = self._locked.get(req_context.req_id)
            if locked is not None:
                locked += keys[:run]
        if locked is None:  # the request is gone
            pages.unlock(keys[:run])
        return [index < run for index in range(len(keys))]
