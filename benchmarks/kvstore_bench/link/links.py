"""The links between the measured process and everything it talks to, all as fast as each other."""

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Literal, Protocol, Self

from kvstore_bench.shaping import ShapedLink
from kvstore_bench.shaping.netns import NetworkNamespace

Shaper = Literal["userspace", "netns"]
UNSHAPED_BPS = 10e9
"""More than anything here carries."""


class Links(Protocol):
    """Context manager; entered before the cluster is started."""

    @property
    def host(self) -> str:
        """What servers listen on."""

    @property
    def command(self) -> tuple[str, ...]:
        """What the command line of the measured process begins with."""

    def routes(self, endpoints: Iterable[str]) -> dict[str, str]:
        """What it dials in place of each of these `host:port`."""

    def set_bandwidth(self, bandwidth_bps: float) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class UserSpaceLinks:
    """A ShapedLink in front of each endpoint. The bytes of a fetch go through one at a time."""

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
    """One link for everything, shaped by the kernel."""

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
    return UserSpaceLinks() if shaper == "userspace" else NamespaceLinks()
