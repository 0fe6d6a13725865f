"""A coordinator that publishes the events of nodes in this process, with real sockets."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from kvstore_api.placement import Member
from kvstore_client.kv_events import EventSubscriber
from kvstore_cluster.arena import Arena
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.events.feed import ReportFeed
from kvstore_cluster.events.hub import EventHub
from kvstore_cluster.node import StorageNode
from kvstore_service.grpc_coordinator import CoordinatorServer, serve_coordinator
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.listen import Address, two_free_ports
from kvstore_service.security import INSECURE, Security

HOST = "127.0.0.1"
BLOCK = 4 << 10


class PublishingCluster:
    """Nodes that report to a coordinator. `limits` are those of the hub."""

    def __init__(self, folder: Path, security: Security = INSECURE, **limits: int) -> None:
        self.folder, self.security, self._limits = folder, security, limits
        self.events = two_free_ports(Address(HOST, 0))
        self.nodes: dict[str, StorageNode] = {}
        self._lives = 0
        self._ends: dict[str, Callable[[], None]] = {}
        self._joins: dict[str, Callable[[], None]] = {}
        self.hub: EventHub
        self.coordinator: Coordinator
        self.front: CoordinatorServer
        self._address = Address(HOST, 0)
        self.start_coordinator()

    @property
    def address(self) -> str:
        return self.front.address

    def start_coordinator(self) -> None:
        catalogue = FileCatalogue(self.folder / "catalogue")
        self.coordinator = Coordinator(catalogue, replicas=2)
        self.hub = EventHub(lambda *node: node in self.coordinator.live(), **self._limits)
        self.front = serve_coordinator(
            self.coordinator,
            CalibrationRegistry(self.folder / "calibrations"),
            CanaryRegistry(self.folder / "canaries"),
            self.hub,
            address=self._address,
            security=self.security,
            events=self.events,
        )
        self._address = Address.parse(self.front.address)

        def end() -> None:
            self.front.stop(0)
            self.coordinator.close()
            catalogue.close()

        self._ends[""] = end

    def restart_coordinator(self) -> None:
        """As after a crash: the nodes join again."""
        self._ends.pop("")()
        self.start_coordinator()
        for join in list(self._joins.values()):
            join()

    def start_node(self, name: str, memory_bytes: int = 1 << 20, disk_bytes: int = 0) -> StorageNode:
        store = SegmentStore(self.folder / name, disk_bytes, segment_bytes=1 << 20) if disk_bytes else None
        isolated = self.security.isolated
        node = StorageNode(name, Arena(memory_bytes, BLOCK), store=store, events=True, isolated=isolated)
        access, tls = self.security.access(), self.security.server_tls()
        server = serve_storage(node, host=HOST, access=access, tls=tls)
        self._lives += 1
        life, member = self._lives, Member(name, server.address)

        def join() -> None:
            self.coordinator.join(member, life)

        join()
        assert node.changes is not None
        feed = ReportFeed(
            name, life, node.changes, lambda report: self.hub.report(report), alive_s=0.05, retry_s=0.05
        )
        feed.start()
        self.nodes[name] = node
        self._joins[name] = join

        def end() -> None:
            feed.stop()
            server.stop(0)
            if store is not None:
                store.close()

        self._ends[name] = end
        return node

    def kill_node(self, name: str) -> None:
        """The coordinator notices by itself."""
        self._ends.pop(name)()
        del self.nodes[name], self._joins[name]

    def stop(self) -> None:
        for end in self._ends.values():
            end()

    def stored(self, tenant: str = "") -> dict[bytes, frozenset[str]]:
        """What the live nodes have, as a router should know it."""
        blocks: dict[bytes, frozenset[str]] = {}
        for node in self.nodes.values():
            cursor, first = 0, True
            while cursor or first:
                first = False
                variants, cursor = node.list(cursor, tenant=tenant)
                for variant in variants:
                    tiers = {"CPU"} if variant.in_memory else set()
                    tiers |= {"STORAGE"} if variant.on_disk else set()
                    block = variant.chunk_id.prefix_id
                    blocks[block] = blocks.get(block, frozenset()) | tiers
        return blocks


@contextlib.contextmanager
def publishing(folder: Path, **options: object) -> Iterator[PublishingCluster]:
    with ExitStack() as stack:
        cluster = PublishingCluster(folder, **options)  # type: ignore[arg-type]
        stack.callback(cluster.stop)
        yield cluster


def follow(
    router: EventSubscriber, wanted: Callable[[], dict[bytes, frozenset[str]]], patience_s: float = 15.0
) -> None:
    """Polls until the router knows what is wanted."""
    deadline_s = time.monotonic() + patience_s
    while not (router.is_current and router.blocks.tiers == wanted()):
        assert time.monotonic() < deadline_s, (len(router.blocks.tiers), len(wanted()), router.is_current)
        router.poll(0.05)
