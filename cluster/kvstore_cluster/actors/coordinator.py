"""The coordinator as a Ray actor."""

from collections.abc import Callable
from pathlib import Path

from kvstore_api.placement import Member, Membership
from kvstore_cluster.actors.endpoint import Endpoint
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator


class CoordinatorActor:
    """Made through `ray.remote`. After a crash Ray runs the constructor again: the catalogue gives back epoch and
    nodes, the folder beside it the calibrations, and `serve` listens on the same address as before. Raises
    CatalogueError, AddressInUseError."""

    def __init__(self, data_dir: Path, serve: Callable[[Coordinator, CalibrationRegistry], Endpoint]) -> None:
        self._coordinator = Coordinator(FileCatalogue(data_dir))
        self._endpoint = serve(self._coordinator, CalibrationRegistry(data_dir / "calibrations"))

    def address(self) -> str:
        return self._endpoint.address

    def membership(self) -> Membership:
        return self._coordinator.membership()

    def join(self, member: Member, incarnation: int) -> None:
        self._coordinator.join(member, incarnation)

    def leave(self, node_id: str, incarnation: int) -> None:
        self._coordinator.leave(node_id, incarnation)

    def stop(self, grace_s: float) -> None:
        self._endpoint.stop(grace_s)
