"""The coordinator as a Ray actor."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from kvstore_api.placement import Member, Membership
from kvstore_cluster.actors.endpoint import Endpoint, do_nothing
from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.calibrations import CalibrationRegistry, RedisMirror
from kvstore_cluster.canaries import CanaryRegistry, RedisCanaryMirror
from kvstore_cluster.catalogue import FileCatalogue, RedisCatalogue
from kvstore_cluster.coordinator import Coordinator, Directives
from kvstore_cluster.encryption import KeySource
from kvstore_cluster.events.base import NodeReport
from kvstore_cluster.events.hub import EventHub
from kvstore_codec.errors import CatalogueError, UnknownNodeError

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_KEYS_PERIOD_S = 1.0
Made = TypeVar("Made")


class CoordinatorActor:
    """The coordinator process. Created through `ray.remote`. After a crash, Ray runs the constructor again: it loads
    the cluster state from the catalogue, opens the calibrations and canaries in the folders beside it, and `serve`
    listens on the same address as before.

    The catalogue is a file in `data_dir`. With `redis_url` it is in Redis, which then also mirrors calibrations and
    canaries. `isolated` says that nodes keep tenants apart. The constructor waits for Redis, because Ray does not
    restart an actor whose constructor failed. With `events` the nodes report their blocks, and `serve` gets a hub that
    merges the reports. With `keys`, which opens the key file in this process, its own files are encrypted, except
    calibrations.

    Raises ConfigurationError, EncryptionKeyError, CatalogueError, AddressInUseError.
    """

    def __init__(
        self,
        data_dir: Path,
        serve: Callable[[Coordinator, CalibrationRegistry, CanaryRegistry, EventHub | None], Endpoint],
        *,
        replicas: int = 1,
        redis_url: str | None = None,
        isolated: bool = False,
        events: bool = False,
        keys: Callable[[], KeySource] | None = None,
        prepare: Callable[[], object] = do_nothing,
    ) -> None:
        """`prepare` is called before everything else."""
        prepare()
        source = None if keys is None else keys()
        folder, canary_folder = data_dir / "calibrations", data_dir / "canaries"
        if redis_url is None:
            self._catalogue: FileCatalogue | RedisCatalogue = FileCatalogue(data_dir, source)
            self._coordinator = Coordinator(self._catalogue, replicas=replicas, isolated=isolated)
            calibrations, canaries = CalibrationRegistry(folder), CanaryRegistry(canary_folder, keys=source)
        else:
            self._catalogue = _waited_for(lambda: RedisCatalogue(redis_url))
            self._coordinator = _waited_for(
                lambda: Coordinator(self._catalogue, replicas=replicas, isolated=isolated)
            )
            mirror = RedisMirror(redis_url)
            calibrations = _waited_for(lambda: CalibrationRegistry(folder, mirror))
            canary_mirror = RedisCanaryMirror(redis_url)
            canaries = _waited_for(lambda: CanaryRegistry(canary_folder, canary_mirror, keys=source))
        coordinator = self._coordinator
        self._hub = EventHub(lambda *node: node in coordinator.live()) if events else None
        self._canaries = canaries
        self._rekeying = BackgroundLoop("kvstore-keys", self._follow_keys, period_s=_KEYS_PERIOD_S)
        if source is not None:
            self._rekeying.start()
        self._endpoint = serve(coordinator, calibrations, canaries, self._hub)

    def address(self) -> str:
        return self._endpoint.address

    def membership(self) -> Membership:
        return self._coordinator.membership()

    def live(self) -> dict[str, int]:
        """Incarnations of the live nodes, by node id."""
        return dict(self._coordinator.live())

    def returned(self, node_id: str, domain: str) -> None:
        """Lets a node own chunks that was drained before its machine was replaced by `domain`. One whose machine is the
        same stays drained. Raises CatalogueError."""
        for node in self._coordinator.nodes():
            if node.member.node_id == node_id and node.member.domain != domain:
                self._cancel_drain(node_id)

    def known(self) -> list[str]:
        """Ids of all nodes, including dead ones."""
        return [node.member.node_id for node in self._coordinator.nodes()]

    def departed(self, node_id: str, is_over: bool) -> bool:
        """Forgets a dead node whose machine is gone, if it was drained, or if the patience with it `is_over`. Returns
        whether it is not known any more. Raises CatalogueError."""
        for node in self._coordinator.nodes():
            if node.member.node_id == node_id:
                if node.alive or not (is_over or node.member.draining):
                    return False
                self._coordinator.leave(node_id, node.incarnation)
        self._cancel_drain(node_id)
        return True

    def join(self, member: Member, incarnation: int, known: int = 0, applied: int = 0) -> Directives:
        """Adds a node and returns its directives, as `Coordinator.register` does."""
        return self._coordinator.register(member, incarnation, known, applied)

    def report(self, report: NodeReport) -> bool:
        """Takes a node's report of its blocks, as `EventHub.report` does."""
        return self._hub is None or self._hub.report(report)

    def leave(self, node_id: str, incarnation: int) -> None:
        self._coordinator.leave(node_id, incarnation)

    def stop(self, grace_s: float) -> None:
        self._rekeying.stop()
        self._endpoint.stop(grace_s)
        self._coordinator.close()
        self._catalogue.close()

    def _cancel_drain(self, node_id: str) -> None:
        with suppress(UnknownNodeError):
            self._coordinator.cancel_drain(node_id)

    def _follow_keys(self) -> None:
        self._canaries.update_key(self._rekeying.stopping)


def _waited_for(make: Callable[[], Made]) -> Made:
    while True:
        try:
            return make()
        except CatalogueError as error:
            log.warning("the coordinator cannot start yet, retrying: %s", error)
            time.sleep(_RETRY_S)
