"""A connection to Redis (or Valkey) with short timeouts, whose errors never contain the password."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvstore_codec.errors import CatalogueError, ConfigurationError

_TIMEOUT_S = 1.0


class RedisConnection:
    """A Redis client that connects at its first use, and again after a failure. Thread-safe. `name` describes the
    server in messages.

    Raises ConfigurationError for an invalid URL.
    """

    def __init__(self, url: str) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        try:
            self._client = redis.Redis.from_url(
                url,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                # One retry, because all pooled connections are dead after a restart of the server.
                retry=Retry(NoBackoff(), 1),
            )
        except (ValueError, TypeError, redis.RedisError):
            # Without the cause, which may contain the URL with its password.
            raise ConfigurationError(
                "the URL of Redis cannot be used; write redis://[user:password@]host[:port][/database]"
            ) from None
        known: dict[str, Any] = self._client.connection_pool.connection_kwargs
        where = known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"
        self.name = f"Redis at {where}, database {known.get('db') or 0}"

    @contextmanager
    def client(self) -> Iterator[Any]:
        """The Redis client. Raises CatalogueError instead of the errors of Redis. Typed as Any, because the library
        types every command as both synchronous and asynchronous."""
        import redis

        try:
            yield self._client
        except redis.RedisError as error:
            raise CatalogueError(f"{self.name} cannot be used ({type(error).__name__}: {error})") from error

    def close(self) -> None:
        self._client.close()
