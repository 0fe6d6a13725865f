"""The shaped links between the measured process and all servers. All have the same bandwidth."""

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Literal, Protocol, Self

from kvstore_bench.shaping import ShapedLink
from kvstore_bench.shaping.netns import NetworkNamespace
from kvstore_client import ClientSettings
from kvstore_client.cluster_view import ClusterView

Shaper = Literal["userspace", "netns"]
UNSHAPED_BPS = 10e9
"""Higher than any rate that is reached here."""


class Links(Protocol):
    """Context manager of the links. Enter it before the cluster starts."""

    @property
    def host(self) -> str:
        """Host that the servers listen on."""

    @property
    def command(self) -> tuple[str, ...]:
        """Prefix of the command line of the measured process."""

    def routes(self, endpoints: Iterable[str]) -> dict[str, str]:
        """Address that the measured process dials in place of each endpoint, `host:port` both."""

    def set_bandwidth(self, bandwidth_bps: float) -> None:
        """Limits each link to `bandwidth_bps` bits per second."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class UserSpaceLinks:
    """Links in user space: a ShapedLink in front of each endpoint. A fetch receives over one of them at a time."""

    host = "127.0.0.1"
    command: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._links = ExitStack()
        self._shaped: list[ShapedLink] = []

    def routes(self, endpoints: Iterable[str]) -> dict[str, str]:
        routes = {}
        for endpoint in endpoints:
            link = self._links.enter_context(ShapedLink(endpoint, bandwidth_bps=UNSHAPED_BPS))
            self._shaped.append(link)
            routes[endpoint] = link.address
        return routes

    def set_bandwidth(self, bandwidth_bps: float) -> None:
        for link in self._shaped:
            link.set_bandwidth(bandwidth_bps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._links.close()


class NamespaceLinks:
    """A link in a network namespace, shaped by the kernel. All connections share it."""

    def __init__(self) -> None:
        self._namespace = NetworkNamespace(UNSHAPED_BPS)
        self.command = self._namespace.command
        self.host = ""

    def routes(self, endpoints: Iterable[str]) -> dict[str, str]:  # noqa: ARG002
        return {}

    def set_bandwidth(self, bandwidth_bps: float) -> None:
        self._namespace.set_bandwidth(bandwidth_bps)

    def __enter__(self) -> Self:
        self._namespace.__enter__()
        self.host = self._namespace.host_address
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._namespace.__exit__(kind, error, trace)


def links_of(shaper: Shaper) -> Links:
    """Makes the links of this kind."""
    return UserSpaceLinks() if shaper == "userspace" else NamespaceLinks()


def endpoints_of(address: str) -> list[str]:
    """Addresses of the coordinator, and of all storage nodes and their bulk ports."""
    view = ClusterView(ClientSettings(address=address))
    try:
        members = view.membership().members
    finally:
        view.close()
    return [address, *(e for member in members for e in (member.endpoint, member.bulk_endpoint) if e)]
