"""Log lines of the project: as text, or as JSON with one object a line."""

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TextIO

from kvstore_api.printable import printable
from kvstore_client.request_id import current_request_id

LOGGERS = ("kvstore_api", "kvstore_codec", "kvstore_client", "kvstore_cluster", "kvstore_service")
MOST_RECENT = 1000
"""Lines that a process keeps."""
_LONGEST_MESSAGE = 4096
_ID = "request_id"


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"

    @property
    def number(self) -> int:
        return logging.getLevelNamesMapping()[self.upper()]


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object on one line. `component` says which process it is of, such as a node's id."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]}..."
        line: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "component": self._component,
            "logger": record.name,
            "message": message,
            _ID: getattr(record, _ID, ""),
            "pid": record.process,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value != ""}, ensure_ascii=False)


class TextFormatter(JsonFormatter):
    """Formats a record as text for people, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return as_text(super().format(record))


class RecentLines(logging.Handler):
    """Keeps the last lines of a process, as JSON. Thread-safe."""

    def __init__(self, component: str = "", most: int = MOST_RECENT) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter(component))
        self._lines: deque[tuple[int, str]] = deque(maxlen=most)
        self._last = time.time_ns()
        """Number of the last line. Larger than all numbers of an earlier process, so that nobody who has read that one
        misses lines of this one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        self._last += 1  # the handler's lock is held
        self._lines.append((self._last, line))

    def after(self, number: int, most: int = MOST_RECENT) -> tuple[list[str], int]:
        """The last `most` lines after the line with this number, oldest first, and the number of the last line."""
        self.acquire()
        try:
            new = [line for at, line in self._lines if at > number]
            return new[-most:], self._last
        finally:
            self.release()


def install(
    log_format: LogFormat,
    level: LogLevel = LogLevel.INFO,
    component: str = "",
    stream: TextIO | None = None,
    recent: RecentLines | None = None,
) -> Callable[[], None]:
    """Write log lines of the project to `stream` (default: stderr), and to `recent` if given. Other handlers, such as
    an engine's own, get these lines no longer. Returns what undoes it."""
    writer = logging.StreamHandler(stream or sys.stderr)
    writer.setFormatter((JsonFormatter if log_format is LogFormat.JSON else TextFormatter)(component))
    handlers: list[logging.Handler] = [writer, *([] if recent is None else [recent])]
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for handler in handlers:
        handler.addFilter(_add_request_id)
    for logger in loggers:
        logger.setLevel(level.number)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)

    def undo() -> None:
        for logger, (old_level, propagates) in zip(loggers, before, strict=True):
            logger.setLevel(old_level)
            logger.propagate = propagates
            for handler in handlers:
                logger.removeHandler(handler)

    return undo


def as_text(line: str) -> str:
    """A line of JSON as text: `2026-07-01T12:00:00.000Z WARNING node-0: message [request]`."""
    told = json.loads(line)
    request = f" [{told[_ID]}]" if _ID in told else ""
    component = f"{told['component']}: " if "component" in told else ""
    text = f"{told['time']} {told['level'].upper()} {component}{told['message']}{request}"
    exception = told.get("exception", "")
    return printable(text) + "".join(f"\n  {printable(part)}" for part in exception.splitlines())


def _add_request_id(record: logging.LogRecord) -> bool:
    if not hasattr(record, _ID):
        setattr(record, _ID, current_request_id())
    return True


def _utc(unix_s: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))
    return f"{whole}.{int(unix_s % 1 * 1000):03}Z"


_INSTALLED: list[LogFormat] = []


def install_once(log_format: LogFormat | None, level: LogLevel) -> None:
    """Write a worker's log lines to stderr. Only the first call with a format has an effect in a process."""
    if log_format is not None and not _INSTALLED:
        _INSTALLED.append(log_format)
        install(log_format, level, "client")
