"""Checks of the services that a cluster uses: Ray, and optionally Redis."""

import os
import shutil
from urllib.parse import urlsplit

from kvstore_service.doctor.finding import Finding, missing, present
from kvstore_service.local_ray import prepare_environment
from kvstore_service.settings import variable

REDIS_URL = variable("redis")
REDIS_TIMEOUT_S = 1.0

_INSTALL_CLUSTER = "pip install 'kvstore-service[cluster]'"
_EMBEDDED = "Not needed: without Redis the catalogue is a file."


def ray() -> Finding:
    try:
        prepare_environment()  # a cluster may start in this process later
        import ray
    except ImportError as error:
        return missing(f"cannot be imported: {error}", f"{_INSTALL_CLUSTER}; clients do not need Ray.")
    return present(str(ray.__version__))


def redis_client() -> Finding:
    try:
        import redis
    except ImportError as error:
        return missing(f"cannot be imported: {error}", f"{_INSTALL_CLUSTER}. {_EMBEDDED}")
    return present(redis.__version__)


def redis_server() -> Finding:
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return present(path)
    return missing("no redis-server or valkey-server on the PATH", f"apt install redis-server. {_EMBEDDED}")


def redis_connection() -> Finding:
    url = os.environ.get(REDIS_URL)
    if not url:
        return missing(f"{REDIS_URL} is not set", _EMBEDDED)
    import redis

    # Only host and port of the URL are shown. A parser's message is not: it may quote a part of the password.
    try:
        client = redis.Redis.from_url(
            url, socket_connect_timeout=REDIS_TIMEOUT_S, socket_timeout=REDIS_TIMEOUT_S, retry=None
        )
        parts = urlsplit(url)
        where = parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"
    except ValueError:
        return missing(f"{REDIS_URL} is not a Redis URL", "Write it as redis://user:password@host:6379/0.")
    try:
        info = client.info("server")
    except (redis.RedisError, OSError) as error:
        return missing(f"{where} does not answer: {error}", f"Start Redis there, or unset {REDIS_URL}.")
    finally:
        client.close()
    return present(f"{where}, version {info['redis_version']}")
