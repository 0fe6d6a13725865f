"""A connection to Redis (or Valkey) that answers soon or says that it does not, and keeps its password to itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvstore_codec.errors import CatalogueError, ConfigurationError

_TIMEOUT_S = 1.0


class RedisConnection:
    """Thread-safe; connects when it is used, again after a failure. `name` says in messages where it is.

    Raises ConfigurationError for a URL that is none.
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
                # Once: the connections of a server that restarted are all dead.
                retry=Retry(NoBackoff(), 1),
            )
        except (ValueError, TypeError, redis.RedisError):
            # Without the cause: it may quote the URL, password and all.
            raise ConfigurationError(
                "the URL of Redis cannot be used; write redis://[user:password@]host[:port][/database]"
            ) from None
        known: dict[str, Any] = self._client.connection_pool.connection_kwargs
        where = known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"
        self.name = f"Redis at {where}, database {known.get('db') or 0}"

    @contextmanager
    def client(self) -> Iterator[Any]:
        """The client; what it raises becomes a CatalogueError. Commands without their types: the library gives each
        of them two."""
        import redis

        try:
            yield self._client
        except redis.RedisError as error:
            raise CatalogueError(f"{self.name} cannot be used ({type(error).__name__}: {error})") from error

    def close(self) -> None:
        self._client.close()
