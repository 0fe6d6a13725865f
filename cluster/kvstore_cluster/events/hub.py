"""Merges the nodes' reports into the events of the cluster. Part of the coordinator; uses no network and no Ray."""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from kvstore_api.kv_events import DISK, MEMORY, Cleared, Event, Removed, Stored, encode_batch
from kvstore_cluster.events.base import NodeReport
from kvstore_cluster.events.block_index import MOST_NODES, BlockIndex, TierEvents, stored
from kvstore_cluster.events.event_log import KEPT_BATCHES, KEPT_BYTES, Batch, EventLog

MOST_TENANTS = 4096
"""Tenants with events. Events of further ones are not published, and counted."""
_SNAPSHOT_BLOCKS = 4096


@dataclass(slots=True)
class _Node:
    place: int  # its number in the indices
    incarnation: int
    report: int  # number of its last report
    former_place: int | None = None  # of what it reported before, while it reports from scratch


class EventHub:
    """The blocks of all live nodes, and the events that tell how they changed. Thread-safe: processes of nodes call
    `report`, and the publisher all other methods. Nothing here waits.

    The events of a tenant say for each tier when a block is stored on the first node and when it is no longer stored on
    any. A restarted coordinator knows no blocks: the nodes report them again, and each tenant's first event is that its
    blocks are cleared.
    """

    def __init__(
        self,
        is_member: Callable[[str, int], bool],
        wake: Callable[[], object] = lambda: None,
        *,
        kept_bytes: int = KEPT_BYTES,
        kept_batches: int = KEPT_BATCHES,
    ) -> None:
        """`is_member` says whether this incarnation of a node is a live member. `wake` is called after new batches."""
        self._is_member, self.wake = is_member, wake
        self._lock = threading.Lock()
        self._log = EventLog(kept_bytes, kept_batches)
        self._indices: dict[str, BlockIndex] = {}  # by tenant
        self._nodes: dict[str, _Node] = {}  # by node id
        self._resyncs = self._unpublished = self._snapshots = self._replays = 0

    def report(self, report: NodeReport) -> bool:
        """Takes a report of a node. False when the hub does not know the node's earlier reports: the node must report
        from scratch."""
        if not self._is_member(report.node_id, report.incarnation):
            return False
        with self._lock:
            node = self._node_of(report)
            if node is None:
                return False
            if report.number <= node.report:  # a repeated call, which came late
                return True
            node.report = report.number
            for tenant, tiers in report.states.items():
                if self._has(tenant):
                    self._append(tenant, self._indices[tenant].update(node.place, tiers))
                else:
                    self._unpublished += len(tiers)
            if report.complete and node.former_place is not None:
                self._drop_place(node.former_place)
                node.former_place = None
        self.wake()
        return True

    def keep(self, members: Collection[tuple[str, int]]) -> None:
        """Forgets the blocks of nodes that are not among these live members, given by node id and incarnation."""
        with self._lock:
            gone = [
                node_id for node_id, node in self._nodes.items() if (node_id, node.incarnation) not in members
            ]
            for node_id in gone:
                self._drop(node_id)
        if gone:
            self.wake()

    def take_unsent(self, most: int) -> list[Batch]:
        """The next batches to send."""
        with self._lock:
            return self._log.take_unsent(most)

    def mark_time(self, tenant: str) -> None:
        """Adds an empty batch to the tenant's events, by whose number subscribers see whether they missed any."""
        with self._lock:
            if self._has(tenant):
                self._log.append(tenant, encode_batch(time.time(), []))

    def tenants(self) -> list[str]:
        with self._lock:
            return list(self._indices)

    def since(self, tenant: str, sequence: int) -> Iterator[tuple[int, bytes]]:
        """Numbers and payloads of the tenant's batches from `sequence` on. If these are no longer kept: of a snapshot,
        which begins with the event that all blocks are cleared, and whose parts all have the number of the last batch
        that it includes."""
        with self._lock:
            batches = self._log.since(tenant, sequence)
            if batches is not None:
                self._replays += 1
                return ((batch.sequence, batch.payload) for batch in batches)
            self._snapshots += 1
            index = self._indices.get(tenant)
            blocks, nodes_of = ([], []) if index is None else index.blocks()
            last = self._log.last(tenant)
        return ((last, payload) for payload in _snapshot(blocks, nodes_of))

    def stats(self) -> dict[str, int]:
        """Counters, and the gauges `nodes`, `tenants` and `blocks`."""
        with self._lock:
            return {
                "nodes": len(self._nodes),
                "tenants": len(self._indices),
                "blocks": sum(map(len, self._indices.values())),
                "batches": self._log.appended,
                "dropped": self._log.dropped,
                "unpublished": self._unpublished,
                "resyncs": self._resyncs,
                "replays": self._replays,
                "snapshots": self._snapshots,
            }

    def _node_of(self, report: NodeReport) -> _Node | None:
        """The node that a report is of. None when it must report from scratch first, or there are too many nodes."""
        node = self._nodes.get(report.node_id)
        if node is not None and node.incarnation != report.incarnation:
            self._drop(report.node_id)
            node = None
        if not report.from_scratch or (node is not None and report.number <= node.report):
            return node
        # What the same process reported before stays until the new reports are complete: most of it is still true.
        former = None if node is None else node.place
        if node is not None and node.former_place is not None:
            self._drop_place(node.former_place)
        used = {place for known in self._nodes.values() for place in (known.place, known.former_place)}
        place = next((place for place in range(MOST_NODES) if place not in used), None)
        if place is None:
            return None
        self._resyncs += 1
        self._nodes[report.node_id] = _Node(place, report.incarnation, report.number - 1, former)
        return self._nodes[report.node_id]

    def _drop(self, node_id: str) -> None:
        node = self._nodes.pop(node_id)
        self._drop_place(node.place)
        if node.former_place is not None:
            self._drop_place(node.former_place)

    def _drop_place(self, place: int) -> None:
        for tenant, index in self._indices.items():
            for events in index.drop_node(place):
                self._append(tenant, events)

    def _has(self, tenant: str) -> bool:
        """Whether events of the tenant are published. Begins with those of a new tenant."""
        if tenant not in self._indices:
            if len(self._indices) >= MOST_TENANTS:
                return False
            self._indices[tenant] = BlockIndex()
            self._log.append(tenant, encode_batch(time.time(), [Cleared()]))
        return True

    def _append(self, tenant: str, events: TierEvents) -> None:
        if events:
            self._log.append(tenant, encode_batch(time.time(), _listed(events)))


def _listed(events: TierEvents) -> list[Event]:
    listed: list[Stored | Removed] = [
        Stored(events.stored_in_memory, MEMORY),
        Stored(events.stored_on_disk, DISK),
        Removed(events.removed_from_memory, MEMORY),
        Removed(events.removed_from_disk, DISK),
    ]
    return [event for event in listed if event.blocks]


def _snapshot(blocks: list[bytes], nodes_of: list[int]) -> Iterator[bytes]:
    yield encode_batch(time.time(), [Cleared()])
    for begin in range(0, len(blocks), _SNAPSHOT_BLOCKS):
        end = begin + _SNAPSHOT_BLOCKS
        yield encode_batch(time.time(), _listed(stored(blocks[begin:end], nodes_of[begin:end])))
