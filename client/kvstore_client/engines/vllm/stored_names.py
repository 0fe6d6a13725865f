"""What an engine knows to be stored, so that it does not store it again."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from kvstore_codec.identity import ChunkId, PrefixId

_MOST_NAMES = 65_536
"""16.8 million tokens, in about 10 MB of memory."""
_STORING_S = 10.0
"""How long encoding and sending take at most."""


class StoredNames:
    """Chunks that were found stored, or were handed over to be stored, the latest ones. Used by one thread."""

    def __init__(self, waits_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`waits_s`: how long chunks may wait before they are encoded. Until they must have been stored, they count as
        stored although a lookup does not find them."""
        self._trusted_s, self._clock = waits_s + _STORING_S, clock
        self._since: OrderedDict[PrefixId, float] = OrderedDict()

    def add(self, chunk_ids: Iterable[ChunkId]) -> None:
        now_s = self._clock()
        for chunk_id in chunk_ids:
            self._since[chunk_id.prefix_id] = now_s
            self._since.move_to_end(chunk_id.prefix_id)
        while len(self._since) > _MOST_NAMES:
            self._since.popitem(last=False)

    def discard(self, chunk_ids: Iterable[ChunkId]) -> None:
        """These chunks turned out not to be stored."""
        for chunk_id in chunk_ids:
            self._since.pop(chunk_id.prefix_id, None)

    def __contains__(self, chunk_id: ChunkId) -> bool:
        since_s = self._since.get(chunk_id.prefix_id)
        return since_s is not None and self._clock() < since_s + self._trusted_s
