"""Texts on a storage node: trees of chunks, since those that begin alike share their first chunks."""

from collections.abc import Sequence

from kvstore_cluster.arena import Arena
from kvstore_cluster.eviction import POLICIES
from kvstore_cluster.listing import MOST_BEHIND
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PendingPut, PutOptions
from kvstore_codec.errors import TextTooLongError
from kvstore_codec.identity import ROOT_PREFIX, ContentId, PrefixId, content_id, prefix_id
from tests.sample_chunk import SampleChunk, sample_chunk

FRAME = 6000
BLOCK = 128 << 10  # a chunk takes one
ROOM = 9
NAMES = sorted(POLICIES)
EXACT = ["exact-zstd"]

Path_ = tuple[int, ...]
"""A chunk by the branches that lead to it: (0, 2) is the third continuation of the first beginning."""


def chunk_at(place: Path_) -> SampleChunk:
    parent = ROOT_PREFIX
    for end in range(1, len(place) + 1):
        content = ContentId(content_id(bytes(32), b"", [*place[:end]]))
        parent = prefix_id(parent, content)
    return _sample(content, parent)


_KNOWN: dict[PrefixId, SampleChunk] = {}


def _sample(content: ContentId, context: PrefixId) -> SampleChunk:
    if context not in _KNOWN:
        number = int.from_bytes(context[:6], "big")
        chunk = sample_chunk(content=number, frame_bytes=FRAME, prefix_id=context)
        _KNOWN[context] = chunk
    return _KNOWN[context]


def text(name: int, chunks: int) -> list[Path_]:
    return [(name, *[0] * number) for number in range(chunks)]


def new_node(policy: str, room: int = ROOM, **options: object) -> StorageNode:
    return StorageNode(
        "node-0",
        Arena(room * BLOCK, BLOCK),
        policy=POLICIES[policy],
        **options,  # type: ignore[arg-type]
    )


def begin(node: StorageNode, place: Path_, tenant: str = "", ttl_s: float = 0) -> PendingPut | None:
    chunk = chunk_at(place)
    behind = tuple(chunk_at(place[:end]).chunk_id for end in range(len(place) - 1, 0, -1))[:MOST_BEHIND]
    options = PutOptions(number=len(place) - 1, behind=behind[:1], tenant=tenant, ttl_s=ttl_s)
    return node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=options)


def put(node: StorageNode, place: Path_, tenant: str = "", ttl_s: float = 0) -> bool:
    pending = begin(node, place, tenant, ttl_s)
    if pending is None:
        return False
    pending.write(chunk_at(place).data)
    return pending.commit()


def ask(node: StorageNode, places: Sequence[Path_], ttl_s: float = 0) -> int:
    """As a client does: looks a text up, uses its stored beginning and puts what is missing behind it, until the node
    keeps the beginning instead. How many chunks were used."""
    result = node.lookup(
        LookupRequest([chunk_at(place).chunk_id for place in places], EXACT, lease_s=10, use_follows=True)
    )
    found = [answer.encoding is not None for answer in result.answers]
    run = next((number for number, there in enumerate(found) if not there), len(found))
    if result.lease_id is not None:
        assert node.use(result.lease_id, ((1 << run) - 1).to_bytes(-(-len(places) // 8), "little"), 256 * run)
        node.release_lease(result.lease_id)
    for place in places[run:]:
        try:
            put(node, place, ttl_s=ttl_s)
        except TextTooLongError:
            break
    return run


def there(node: StorageNode, place: Path_) -> bool:
    return (
        node.lookup(LookupRequest([chunk_at(place).chunk_id], EXACT, peek=True)).answers[0].encoding
        is not None
    )


def kept(node: StorageNode, places: Sequence[Path_]) -> str:
    return "".join(str(int(there(node, place))) for place in places)
