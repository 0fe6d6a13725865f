"""What a storage node is told of the text that a chunk belongs to."""

from collections.abc import Sequence

from kvstore_api.placement import Member
from kvstore_codec.identity import ChunkId


class TextPlaces:
    """Where the chunks of one text stand. A node keeps the beginning of a text rather than its end, and sees only the
    chunks that it owns: so it is told of each which one before it is there, too."""

    def __init__(self, chunks: Sequence[ChunkId], owners: Sequence[Sequence[Member]]) -> None:
        """All chunks of the text, in order, and to which nodes each goes."""
        self._numbers: dict[ChunkId, int] = {}
        self._behind: dict[tuple[ChunkId, str], ChunkId] = {}
        latest: dict[str, ChunkId] = {}
        for number, (chunk_id, members) in enumerate(zip(chunks, owners, strict=True)):
            self._numbers[chunk_id] = number
            for member in members:
                if (before := latest.get(member.node_id)) is not None:
                    self._behind[chunk_id, member.node_id] = before
                latest[member.node_id] = chunk_id

    def number(self, chunk_id: ChunkId) -> int:
        """How many chunks are before it."""
        return self._numbers.get(chunk_id, 0)

    def behind(self, chunk_id: ChunkId, owner: Member) -> ChunkId | None:
        """The nearest chunk before it that goes to `owner`, too."""
        return self._behind.get((chunk_id, owner.node_id))
