"""Copies of the calibrations in Redis, so that they outlive the coordinator's disk.

Under `<namespace>:calibrations:`

    index                     sorted set of `<model digest> <digest> <size>`, scored by sequence number
    sequence                  the last sequence number
    data:<digest>:<number>    1 MiB of the bytes
    unfinished:<token>:...    1 MiB of the bytes of a running upload; those of an aborted upload expire
"""

import secrets
from collections.abc import Iterator
from pathlib import Path

from kvstore_api.calibrations import MAX_PIECE_BYTES
from kvstore_cluster.calibrations.base import CalibrationRecord
from kvstore_cluster.catalogue.redis import DEFAULT_NAMESPACE
from kvstore_cluster.redis_connection import RedisConnection
from kvstore_codec.errors import CatalogueError, DamagedCalibrationError

_UNFINISHED_LIFE_S = 3600

# ARGV: the index entry, the key prefixes of unfinished and of finished pieces, and the number of pieces.
_PUBLISH = """
for number = 0, tonumber(ARGV[4]) - 1 do
  redis.call('RENAME', ARGV[2] .. number, ARGV[3] .. number)
  redis.call('PERSIST', ARGV[3] .. number)
end
return redis.call('ZADD', KEYS[1], redis.call('INCR', KEYS[2]), ARGV[1])
"""


class RedisMirror:
    """A mirror of calibrations in Redis. Thread-safe. Takes the `url` and `namespace` of the RedisCatalogue, whose lock
    also protects this mirror."""

    def __init__(self, url: str, namespace: str = DEFAULT_NAMESPACE) -> None:
        self._redis = RedisConnection(url)
        self._prefix = f"{namespace}:calibrations:"

    def keep(self, record: CalibrationRecord, file: Path) -> None:
        unfinished = f"{self._prefix}unfinished:{secrets.token_hex(8)}:"
        entry = f"{record.model_digest.hex()} {record.digest.hex()} {record.size_bytes}"
        with self._redis.client() as client, file.open("rb") as source:
            count = 0
            while piece := source.read(MAX_PIECE_BYTES):
                client.set(f"{unfinished}{count}", piece, ex=_UNFINISHED_LIFE_S)
                count += 1
            keys = (f"{self._prefix}index", f"{self._prefix}sequence")
            client.eval(_PUBLISH, 2, *keys, entry, unfinished, self._data(record), count)

    def records(self) -> list[CalibrationRecord]:
        with self._redis.client() as client:
            entries = client.zrange(f"{self._prefix}index", 0, -1)
        try:
            return [_record(entry.decode()) for entry in entries]
        except ValueError as error:
            raise CatalogueError(
                f"{self._prefix}index in {self._redis.name} is damaged ({error}); remove it"
            ) from error

    def pieces(self, record: CalibrationRecord) -> Iterator[bytes]:
        for number in range(-(-record.size_bytes // MAX_PIECE_BYTES)):
            with self._redis.client() as client:
                piece = client.get(f"{self._data(record)}{number}")
            if piece is None:
                raise DamagedCalibrationError(
                    f"{self._redis.name} has lost a part of calibration {record.digest.hex()[:12]}; publish it again"
                )
            yield piece

    def close(self) -> None:
        self._redis.close()

    def _data(self, record: CalibrationRecord) -> str:
        return f"{self._prefix}data:{record.digest.hex()}:"


def _record(entry: str) -> CalibrationRecord:
    model_digest, digest, size_bytes = entry.split()
    return CalibrationRecord(bytes.fromhex(digest), bytes.fromhex(model_digest), int(size_bytes))
