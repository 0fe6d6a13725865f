"""Reads traces in the format of the Mooncake project: JSON lines with a timestamp in ms, lengths in tokens, and the
prompt's block hashes (`hash_ids`), one per 512 tokens. A hash covers its block and all blocks before it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from kvstore_codec import bounded
from kvstore_codec.errors import ConfigurationError

_MOST_VALUES = 1 << 16
"""Of a line: enough for prompts of 30 million tokens."""

Blocks = tuple[int, ...]
"""The distinct blocks of one prompt, in order."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace: prompts in order of time."""

    name: str
    requests: tuple[Blocks, ...]

    @property
    def references(self) -> int:
        return sum(map(len, self.requests))

    def footprint(self) -> frozenset[int]:
        """All distinct blocks."""
        return frozenset(chain.from_iterable(self.requests))


def read_trace(path: Path) -> Trace:
    """Reads a trace. Raises ConfigurationError, whose text names the first invalid line."""
    try:
        with path.open(encoding="utf-8") as lines:
            timed = list(_requests(path.name, lines))
    except OSError as error:
        raise ConfigurationError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"the trace {path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if not any(blocks for _, blocks in timed):
        raise ConfigurationError(f"the trace {path} has no blocks")
    timed.sort(key=lambda request: request[0])
    return Trace(path.stem, tuple(blocks for _, blocks in timed))


def _requests(name: str, lines: Iterator[str]) -> Iterator[tuple[float, Blocks]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = bounded.loads(line, _MOST_VALUES)
        except ValueError as error:
            raise ConfigurationError(f"{name}, line {number}: not JSON: {error}") from error
        if not isinstance(request, dict):
            raise ConfigurationError(f"{name}, line {number}: not a JSON object: {line.strip()[:40]}")
        for field in ("timestamp", "hash_ids"):
            if field not in request:
                raise ConfigurationError(f"{name}, line {number}: the field {field!r} is missing")
        timestamp, blocks = request["timestamp"], request["hash_ids"]
        if isinstance(timestamp, bool) or not isinstance(timestamp, int | float):
            raise ConfigurationError(f"{name}, line {number}: 'timestamp' is not a number: {timestamp!r}")
        # `type` instead of isinstance, because a bool is an int.
        if not isinstance(blocks, list) or not all(type(block) is int and block >= 0 for block in blocks):
            raise ConfigurationError(f"{name}, line {number}: 'hash_ids' is not a list of integers from 0")
        yield timestamp, tuple(dict.fromkeys(blocks))
