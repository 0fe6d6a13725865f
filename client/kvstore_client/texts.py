"""The place of chunks in their text, as told to storage nodes."""

from collections.abc import Sequence

from kvstore_api.placement import Member
from kvstore_codec.identity import ChunkId


class TextPlaces:
    """Places of a text's chunks. A node keeps the beginning of a text rather than its end, but sees only the chunks
    that it owns, so each chunk is sent with the id of the previous chunk on that node."""

    def __init__(
        self, chunks: Sequence[ChunkId], owners: Sequence[Sequence[Member]], chunks_before: int = 0
    ) -> None:
        """`chunks` are the chunks of the text behind its first `chunks_before`, in order; `owners` are the nodes of
        each."""
        self._numbers: dict[ChunkId, int] = {}
        self._behind: dict[tuple[ChunkId, str], ChunkId] = {}
        latest: dict[str, ChunkId] = {}
        for number, (chunk_id, members) in enumerate(zip(chunks, owners, strict=True), start=chunks_before):
            self._numbers[chunk_id] = number
            for member in members:
                if (before := latest.get(member.node_id)) is not None:
                    self._behind[chunk_id, member.node_id] = before
                latest[member.node_id] = chunk_id

    def number(self, chunk_id: ChunkId) -> int:
        """Number of chunks before this one."""
        return self._numbers.get(chunk_id, 0)

    def behind(self, chunk_id: ChunkId, owner: Member) -> ChunkId | None:
        """The nearest preceding chunk that goes to `owner`, too."""
        return self._behind.get((chunk_id, owner.node_id))
