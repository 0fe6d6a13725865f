"""The log of a process of the cluster. It keeps its last lines, which `Logs` returns: nobody sees what the processes of
Ray's actors write."""

import logging

import grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.logs import MOST_RECENT, LogFormat, LogLevel, RecentLines, install

_KEPT: list[RecentLines] = []


def keep_logs(component: str, log_format: LogFormat, level: LogLevel) -> None:
    """Keep the log lines of this process from now on: those of `level` and above, and at least those of INFO. They are
    also written to stderr, where a Ray cluster collects them. Only the first call in a process has an effect."""
    if not _KEPT:
        least = LogLevel.DEBUG if level is LogLevel.DEBUG else LogLevel.INFO
        _KEPT.append(RecentLines(component))
        install(log_format, least, component, recent=_KEPT[0])
        logging.getLogger(__name__).info("started")


def logs(request: pb.LogsRequest, context: grpc.ServicerContext) -> pb.LogsReply:  # noqa: ARG001
    """Serves `Logs`: the lines that are kept in this process. None in a process that keeps none."""
    if not _KEPT:
        return pb.LogsReply()
    lines, last = _KEPT[0].after(request.after, min(request.limit or MOST_RECENT, MOST_RECENT))
    return pb.LogsReply(lines=lines, last=last)
