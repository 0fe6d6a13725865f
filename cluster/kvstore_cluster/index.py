"""What a storage node holds: content -> contexts -> encodings -> entry."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kvstore_cluster.arena import Extent
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.identity import ChunkId, ContentId, PrefixId


class VariantKey(NamedTuple):
    """Names one stored variant of a chunk."""

    content_id: ContentId
    prefix_id: PrefixId
    encoding: str

    @classmethod
    def of(cls, chunk_id: ChunkId, encoding: str) -> "VariantKey":
        return cls(chunk_id.content_id, chunk_id.prefix_id, encoding)


@dataclass(slots=True, eq=False)
class Entry:
    """A complete, verified chunk. `readers` counts those whose views of `extent` are still in use."""

    key: VariantKey
    header: ChunkHeader
    header_bytes: bytes
    extent: Extent
    readers: int = 0
    visible: bool = True


class ChunkIndex:
    """Every lookup is a constant number of dictionary look-ups, however many contexts a content has."""

    def __init__(self) -> None:
        self._contents: dict[ContentId, dict[PrefixId, dict[str, Entry]]] = {}
        self._count = 0

    def get(self, key: VariantKey) -> Entry | None:
        return self.encodings(key.content_id, key.prefix_id).get(key.encoding)

    def encodings(self, content_id: ContentId, prefix_id: PrefixId) -> dict[str, Entry]:
        """The entries of one exact chunk, by encoding. The caller must not change it."""
        return self._contents.get(content_id, {}).get(prefix_id, {})

    def other_contexts(self, content_id: ContentId, prefix_id: PrefixId) -> int:
        """How many other contexts hold the same content."""
        contexts = self._contents.get(content_id, {})
        return len(contexts) - (prefix_id in contexts)

    def add(self, entry: Entry) -> None:
        """The key is new."""
        content_id, prefix_id, encoding = entry.key
        self._contents.setdefault(content_id, {}).setdefault(prefix_id, {})[encoding] = entry
        self._count += 1

    def remove(self, key: VariantKey) -> Entry:
        """The key is known."""
        contexts = self._contents[key.content_id]
        encodings = contexts[key.prefix_id]
        entry = encodings.pop(key.encoding)
        if not encodings:
            del contexts[key.prefix_id]
        if not contexts:
            del self._contents[key.content_id]
        self._count -= 1
        return entry

    def __iter__(self) -> Iterator[Entry]:
        for contexts in self._contents.values():
            for encodings in contexts.values():
                yield from encodings.values()

    def __len__(self) -> int:
        return self._count
