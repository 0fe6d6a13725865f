"""The places of the bulk port: which connections of identified callers are open."""

from collections import OrderedDict

from kvstore_api.byte_stream import ByteStream


class NoPlaceError(Exception):
    """All places are taken by connections with a request in progress. The message is for the client."""


class Places:
    """Open connections of identified callers: at most `most` in all, and `most_of_tenant` of one tenant. One more takes
    the place of an idle connection, whose client reconnects. Not thread-safe."""

    def __init__(self, most: int, most_of_tenant: int) -> None:
        self._most, self._most_of_tenant = most, most_of_tenant
        self._tenant: dict[ByteStream, str] = {}
        self._count: dict[str, int] = {}
        self._idle: dict[str, OrderedDict[ByteStream, None]] = {}  # of each tenant, the longest idle first

    def take(self, stream: ByteStream, tenant: str) -> ByteStream | None:
        """Gives the connection a place. Returns the connection that the caller must close for it: the longest idle one
        of the same tenant at its limit, or else of the tenant with the most connections. Raises NoPlaceError."""
        out = None
        if self._count.get(tenant, 0) >= self._most_of_tenant:
            out = self._longest_idle(tenant, f"{self._most_of_tenant} connections of this tenant")
        elif len(self._tenant) >= self._most:
            crowds = [name for name in self._count if self._idle.get(name)]
            most = max(crowds, key=self._count.__getitem__, default=tenant)
            out = self._longest_idle(most, f"{self._most} connections")
        if out is not None:
            self.leave(out)
        self._tenant[stream] = tenant
        self._count[tenant] = self._count.get(tenant, 0) + 1
        return out

    def leave(self, stream: ByteStream) -> None:
        """Frees the place of a connection. Does nothing if it has none."""
        tenant = self._tenant.pop(stream, None)
        if tenant is None:
            return
        self._count[tenant] -= 1
        if (idle := self._idle.get(tenant)) is not None:
            idle.pop(stream, None)
        if not self._count[tenant]:
            del self._count[tenant]
            self._idle.pop(tenant, None)

    def set_idle(self, stream: ByteStream) -> None:
        """The connection waits for a request from now on."""
        if (tenant := self._tenant.get(stream)) is not None:
            self._idle.setdefault(tenant, OrderedDict())[stream] = None

    def set_busy(self, stream: ByteStream) -> None:
        """The connection has received a request."""
        if (tenant := self._tenant.get(stream)) is not None:
            self._idle[tenant].pop(stream, None)

    @property
    def idle(self) -> list[ByteStream]:
        return [stream for streams in self._idle.values() for stream in streams]

    def __contains__(self, stream: ByteStream) -> bool:
        return stream in self._tenant

    def __len__(self) -> int:
        return len(self._tenant)

    def _longest_idle(self, tenant: str, taken: str) -> ByteStream:
        for stream in self._idle.get(tenant, ()):
            return stream
        raise NoPlaceError(f"{taken} have a request in progress, and no more are served; try again later")
