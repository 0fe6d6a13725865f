"""Writes the log lines of all processes of a cluster to one stream."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

import grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.connector import Connector
from kvstore_client.logs import LogFormat, LogLevel, as_text
from kvstore_cluster.background import BackgroundLoop

_PERIOD_S = 1.0
_TIMEOUT_S = 2.0


class LogFollower:
    """Asks the coordinator and every node for new lines once a second, from `start` until `stop`. Lines of a process
    that ended in the meantime are lost, and so are lines beyond the last 1,000."""

    def __init__(
        self,
        address: Callable[[], str],
        connector: Connector,
        log_format: LogFormat,
        level: LogLevel,
        stream: TextIO,
    ) -> None:
        """`address` returns that of the coordinator. Lines below `level` are not written."""
        self._address, self._connector = address, connector
        self._format, self._level, self._stream = log_format, level, stream
        self._channels: dict[str, grpc.Channel] = {}
        self._last: dict[str, int] = {}
        """Number of the last line written, by address."""
        self._loop = BackgroundLoop("kvstore-logs", self.follow, period_s=_PERIOD_S)

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        """Writes what is new, and stops."""
        self._loop.stop()
        with suppress(OSError, ValueError):  # the stream was closed
            self.follow()
        for channel in self._channels.values():
            channel.close()

    def follow(self) -> None:
        """Writes the lines that are new since the last call."""
        coordinator = rpc.CoordinatorStub(self._channel(self._address()))
        try:
            members = coordinator.Membership(pb.MembershipRequest(), timeout=_TIMEOUT_S).members
        except grpc.RpcError:
            return
        endpoints = [member.endpoint for member in members]
        self._write(self._address(), coordinator)
        for endpoint in endpoints:
            self._write(endpoint, rpc.StorageStub(self._channel(endpoint)))
        for gone in self._channels.keys() - {self._address(), *endpoints}:
            self._channels.pop(gone).close()
            self._last.pop(gone, None)

    def _write(self, address: str, stub: rpc.StorageStub | rpc.CoordinatorStub) -> None:
        try:
            reply = stub.Logs(pb.LogsRequest(after=self._last.get(address, 0)), timeout=_TIMEOUT_S)
        except grpc.RpcError:  # it has ended, or is of an older version
            return
        self._last[address] = max(reply.last, self._last.get(address, 0))
        for line in reply.lines:
            if LogLevel(json.loads(line)["level"]).number >= self._level.number:
                shown = line if self._format is LogFormat.JSON else as_text(line)
                print(shown, file=self._stream, flush=True)

    def _channel(self, address: str) -> grpc.Channel:
        if address not in self._channels:
            self._channels[address] = self._connector.channel(address)
        return self._channels[address]
