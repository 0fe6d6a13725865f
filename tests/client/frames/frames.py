"""A stored document, and reads of its frames."""

from collections.abc import Sequence

from kvstore_client import KVStoreClient
from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.cut import cut_period
from kvstore_client.frames import FrameResult
from kvstore_client.match import Match
from kvstore_client.new_chunk import NewChunk
from tests.client.chunks import SPEC, encoded_chunk, ids, random_kv
from tests.client.conftest import ServedCluster
from tests.damage import flip_bit

CHUNKS = 4
DOCUMENT = ids(CHUNKS)


def put(client: KVStoreClient) -> None:
    new = [NewChunk(chunk_id, lambda i=i: random_kv(i)) for i, chunk_id in enumerate(DOCUMENT)]  # type: ignore[misc]
    assert client.store.put(SPEC, new).result(20) == CHUNKS


def tasks_of(match: Match, period: int, slots: Sequence[int]) -> list[ReadTask]:
    return [
        task
        for index, chunk in enumerate(match.chunks)
        for task in cut_period(index, chunk, chunk.variants[0], period, slots)
    ]


def stored_bytes(task: ReadTask) -> bytes:
    encoded = encoded_chunk(task.chunk.chunk_id, task.chunk_index)
    offset, length = encoded.header.range_bytes(task.first_frame, task.frame_count)
    return b"".join(encoded.parts)[offset : offset + length]


def by_index(results: Sequence[FrameResult]) -> list[FrameResult]:
    return sorted(results, key=lambda result: result.index)


def flip_a_stored_bit(cluster: ServedCluster, task: ReadTask) -> None:
    node = next(node for node in cluster.nodes if node.node_id == task.chunk.member.node_id)
    with node.open(task.chunk.chunk_id, task.encoding.name) as reader:
        flip_bit(next(reader.pieces(task.first_frame, 1, 1 << 20))[0])
