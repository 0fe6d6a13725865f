"""Replays a trace through real storage nodes, with the puts, lookups and uses of clients, in small chunks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvstore_api.placement import Member, Placement
from kvstore_bench.trace.placement import members
from kvstore_bench.trace.trace import Blocks
from kvstore_client.texts import TextPlaces
from kvstore_cluster.arena import Arena
from kvstore_cluster.eviction import EvictionPolicy
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_codec.chunk import write_header
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ArenaFullError, TextTooLongError
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype

_ENCODING = "exact-raw"
_GEOMETRY = Geometry(layers=1, kv_heads=1, head_dim=8, dtype=KVDtype.BFLOAT16)
_FRAMES = [bytes(16)] * _GEOMETRY.frame_count
_BLOCK_BYTES = 1 << 10  # a chunk of a few small frames takes one
_LEASE_S = 60.0
_TOKENS = 512
_REPORT_EVERY = 1000


@dataclass(frozen=True, slots=True)
class NodeHits:
    """Hits of a replay. `prefix` is the share of all block references that prompts could use. `hits` is the number of
    hits that the nodes counted, divided by all references. `puts` is the number of stored blocks."""

    prefix: float
    hits: float
    puts: int


class NodeReplay:
    """Replays prompts through `nodes` real storage nodes, which have room for `capacity_chunks` together. Each node
    gets the blocks that placement assigns to it. For each prompt the replay looks up its blocks, reports the used ones,
    and puts the missing ones in order.

    With `knows_texts` the replay acts like current clients: it names the chunks before each chunk, counts only usable
    blocks as used, and stops putting a prompt after a node has refused a chunk in favour of its text's beginning.
    Without, it acts like earlier clients: all found blocks count as used, and all missing blocks are put.
    """

    def __init__(
        self,
        policy: Callable[[], EvictionPolicy],
        capacity_chunks: int,
        content_ids: Mapping[int, bytes],
        *,
        nodes: int = 1,
        knows_texts: bool = True,
    ) -> None:
        self._members = members(nodes)
        self._placement = Placement(self._members)
        self._nodes = {
            member.node_id: StorageNode(
                member.node_id,
                Arena(max(1, (capacity_chunks + number) // nodes) * _BLOCK_BYTES, _BLOCK_BYTES),
                policy=policy,
            )
            for number, member in enumerate(self._members)
        }
        self._content_ids = content_ids
        self._knows_texts = knows_texts

    def run(self, requests: Sequence[Blocks], advance: Callable[[int], None] = lambda _: None) -> NodeHits:
        """Replays the prompts. Calls `advance` from time to time with the number of finished prompts."""
        used = 0
        for number, request in enumerate(requests, 1):
            ids = [self._chunk_id(block) for block in request]
            owners = self._placement.owners([chunk_id.content_id for chunk_id in ids])
            run = self._look_up(ids, owners)
            used += run
            self._put(ids, owners, run)
            if number % _REPORT_EVERY == 0:
                advance(_REPORT_EVERY)
        advance(len(requests) % _REPORT_EVERY)
        references = sum(map(len, requests))
        for node in self._nodes.values():
            node.check_integrity()
        counters = [node.stats().counters for node in self._nodes.values()]
        hits = sum(counts["hits"] for counts in counters)
        return NodeHits(used / references, hits / references, sum(counts["puts"] for counts in counters))

    def _look_up(self, ids: Sequence[ChunkId], owners: Sequence[Sequence[Member]]) -> int:
        """Number of blocks at the prompt's beginning that are stored."""
        asked: dict[str, list[int]] = {}
        for index, (owner,) in enumerate(owners):
            asked.setdefault(owner.node_id, []).append(index)
        there = [False] * len(ids)
        leases = []
        for node_id, indices in asked.items():
            result = self._nodes[node_id].lookup(
                LookupRequest(
                    [ids[index] for index in indices],
                    [_ENCODING],
                    lease_s=_LEASE_S,
                    use_follows=self._knows_texts,
                )
            )
            for index, answer in zip(indices, result.answers, strict=True):
                there[index] = answer.encoding is not None
            if result.lease_id is not None:
                leases.append((self._nodes[node_id], result.lease_id, indices))
        run = next((index for index, found in enumerate(there) if not found), len(ids))
        for node, lease_id, indices in leases:
            leading = sum(index < run for index in indices)
            if self._knows_texts:
                bits = ((1 << leading) - 1).to_bytes(-(-len(indices) // 8), "little")
                node.use(lease_id, bits, leading * _TOKENS)
            node.release_lease(lease_id)
        return run

    def _put(self, ids: Sequence[ChunkId], owners: Sequence[Sequence[Member]], first: int) -> None:
        text = TextPlaces(ids, owners)
        for chunk_id, (owner,) in zip(ids[first:], owners[first:], strict=True):
            options = PutOptions()
            if self._knows_texts:
                before = text.behind(chunk_id, owner)
                options = PutOptions(number=text.number(chunk_id), behind=(before,) if before else ())
            header, data = write_header(bytes(32), chunk_id, Encoding.parse(_ENCODING), _GEOMETRY, _FRAMES)
            try:
                put = self._nodes[owner.node_id].begin_put(
                    chunk_id, _ENCODING, header.size_bytes, options=options
                )
            except TextTooLongError:
                break
            except ArenaFullError:
                continue
            if put is not None:
                put.write(data + b"".join(_FRAMES))
                put.commit()

    def _chunk_id(self, block: int) -> ChunkId:
        # The hash of a block in a trace also covers all blocks before it.
        name = self._content_ids[block]
        return ChunkId(ContentId(name), PrefixId(name))
