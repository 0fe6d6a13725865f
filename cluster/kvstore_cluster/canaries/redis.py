"""Copies of the canaries in Redis, so that they outlive the coordinator's disk.

`<namespace>:canaries` is a hash: key of the canary (hex) -> generation in decimal, a colon, and the document.
"""

import logging
import re
from collections.abc import Iterator

from kvstore_cluster.canaries.base import KEY
from kvstore_cluster.catalogue.redis import DEFAULT_NAMESPACE
from kvstore_cluster.redis_connection import RedisConnection

log = logging.getLogger(__name__)

_KEY = re.compile(KEY.encode())


class RedisCanaryMirror:
    """A mirror of canaries in Redis. Thread-safe. Takes the `url` and `namespace` of the RedisCatalogue, whose lock
    also protects this mirror."""

    def __init__(self, url: str, namespace: str = DEFAULT_NAMESPACE) -> None:
        self._redis = RedisConnection(url)
        self._key = f"{namespace}:canaries"

    def keep(self, key: bytes, generation: int, content: bytes) -> None:
        with self._redis.client() as client:
            client.hset(self._key, key.hex(), b"%d:" % generation + content)

    def forget(self, key: bytes) -> None:
        with self._redis.client() as client:
            client.hdel(self._key, key.hex())

    def copies(self) -> Iterator[tuple[bytes, int, bytes]]:
        with self._redis.client() as client:
            names = client.hkeys(self._key)
        for name in names:
            with self._redis.client() as client:
                kept = client.hget(self._key, name)
            generation, _, content = (kept or b"").partition(b":")
            if generation.isdigit() and _KEY.fullmatch(name):
                yield bytes.fromhex(name.decode()), int(generation), content
            else:
                log.warning("%r in %s is not a canary", name[:80], self._redis.name)

    def close(self) -> None:
        self._redis.close()
