"""A catalogue in Redis or Valkey, for clusters whose coordinator may lose its disk.

It has three keys, which begin with `<namespace>:catalogue:`

    owner      the token of the one coordinator that may write; expires _LOCK_S after its last renewal
    document   the state
    revision   `<number> <token of the writer>`; the number increases with every save

Every write is one script, so owner, document and revision are always consistent.
"""

import logging
import re
import secrets
import threading
import time
from typing import NamedTuple

from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.catalogue.base import ClusterState
from kvstore_cluster.catalogue.document import read_document, unsound, write_document
from kvstore_cluster.redis_connection import RedisConnection
from kvstore_codec.errors import CatalogueError

log = logging.getLogger(__name__)

DEFAULT_NAMESPACE = "kvstore"
_LOCK_S = 3.0
_LOCK_MS = int(_LOCK_S * 1000)
_RENEW_PERIOD_S = 1.0
_NUMBER = re.compile(r"[0-9]{1,15}")
"""Numbers that Lua, too, has without rounding."""

# ARGV: token, lifetime of the lock in ms, the known revision, the new revision and its document (both empty to renew
# only). An owner key that expired or was deleted is set again. A revision older than the known one comes from a wiped
# database or an old snapshot, and is overwritten, because no other coordinator can have written it. A newer revision
# with this token comes from a write whose reply was lost, and is overwritten, too. Any other revision belongs to
# another coordinator.
_WRITE = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return {'refused', ''} end
local found = redis.call('GET', KEYS[3]) or ''
local number = tonumber(string.match(found, '^%d+') or '0')
local known = tonumber(string.match(ARGV[3], '^%d+') or '0')
local ours = string.match(found, ' (.*)$') == ARGV[1]
if not ours and (number > known or (number == known and found ~= ARGV[3])) then return {'refused', found} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if ARGV[4] ~= '' then
  redis.call('SET', KEYS[2], ARGV[5])
  redis.call('SET', KEYS[3], ARGV[4])
end
return {'written', found}
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class Saved(NamedTuple):
    """The state that Redis should hold. Number 0 means that nothing was saved yet."""

    number: int
    writer: str
    document: str

    @property
    def revision(self) -> str:
        return f"{self.number} {self.writer}" if self.number else ""


def read_saved(document: bytes, revision: bytes, name: str) -> tuple[Saved, ClusterState]:
    """Parses the values of both keys. `name` is their origin, for errors. Raises CatalogueError for any that are not
    sound."""
    try:
        number, _, writer = revision.decode().partition(" ")
        saved = Saved(int(number), writer, document.decode())
    except ValueError as error:
        raise unsound(name, str(error)) from error
    if not _NUMBER.fullmatch(number):
        raise unsound(name, f"its revision is {number!r}")
    return saved, read_document(saved.document, name)


class RedisCatalogue:
    """Stores a ClusterState in Redis. `url` is redis://[user:password@]host[:port][/database], rediss:// with TLS, or
    unix://. Clusters that share a database need different namespaces. Errors and logs show only the host of the URL.

    Locks the namespace from construction until `close`. The constructor waits about 3 s for the lock of a crashed
    coordinator to expire. When Redis returns empty or with an older state, the catalogue writes its state again and
    logs that.

    Raises ConfigurationError for an invalid URL, and CatalogueError when Redis does not answer or the namespace is in
    use.
    """

    def __init__(self, url: str, namespace: str = DEFAULT_NAMESPACE) -> None:
        self._redis = RedisConnection(url)
        self._keys = [f"{namespace}:catalogue:{key}" for key in ("owner", "document", "revision")]
        self._name = f"{self._keys[1]} in {self._redis.name}"
        self._token = secrets.token_hex(16)
        self._lock = threading.Lock()  # one command at a time, because another thread renews the lock
        self._saved = Saved(0, "", "")
        self._usable = True
        try:
            self._acquire()
        except CatalogueError:
            self._redis.close()
            raise
        # Pauses must not exceed the renewal period, or the lock of the namespace expires.
        self._renewing = BackgroundLoop(
            "kvstore-redis-owner", self._renew, period_s=_RENEW_PERIOD_S, longest_pause_s=_RENEW_PERIOD_S
        )
        self._renewing.start()

    def load(self) -> ClusterState:
        """The last saved state, or an empty one when none was saved. Raises CatalogueError."""
        with self._lock:
            with self._redis.client() as client:
                document, revision = client.mget(self._keys[1:])
            if document is None or revision is None:
                log.warning(
                    "%s is empty: a new cluster begins. If there was one, its pins, quotas and draining nodes are lost",
                    self._name,
                )
                return ClusterState()
            self._saved, state = read_saved(document, revision, self._name)
            return state

    def save(self, state: ClusterState) -> None:
        """Saves the state in Redis. The appendfsync setting of Redis determines its durability. Raises
        CatalogueError."""
        with self._lock:
            new = Saved(self._saved.number + 1, self._token, write_document(state))
            self._note_loss(self._write(new))
            self._saved = new

    def close(self) -> None:
        """Releases the namespace for another coordinator."""
        self._renewing.stop()
        try:
            with self._redis.client() as client:
                client.eval(_RELEASE, 1, self._keys[0], self._token)
        except CatalogueError as error:
            log.warning(
                "cannot release the lock of the catalogue, which expires in %.0f s: %s", _LOCK_S, error
            )
        self._redis.close()

    def _acquire(self) -> None:
        """Locks the namespace. Waits until the lock of a crashed coordinator has expired. Raises CatalogueError when a
        live coordinator has the lock."""
        deadline_s = time.monotonic() + 2 * _LOCK_S
        while True:
            with self._redis.client() as client:
                if client.set(self._keys[0], self._token, nx=True, px=_LOCK_MS):
                    return
            if time.monotonic() > deadline_s:
                raise CatalogueError(
                    f"the catalogue {self._name} is in use by another coordinator; stop it, or choose another namespace"
                )
            time.sleep(_LOCK_S / 30)

    def _renew(self) -> None:
        try:
            with self._lock:
                if self._note_loss(self._write(None)):
                    self._write(self._saved)
        except CatalogueError as error:
            if self._usable:
                log.warning("pins, quotas and draining nodes cannot be changed: %s", error)
            self._usable = False
        else:
            if not self._usable:
                log.info("%s can be used again", self._name)
            self._usable = True

    def _write(self, new: Saved | None) -> str:
        """Writes `new`, or only renews the lock when it is None. Returns the previous revision. Raises
        CatalogueError."""
        arguments = (new.revision, new.document) if new is not None else ("", "")
        with self._redis.client() as client:
            verdict, found = client.eval(
                _WRITE, 3, *self._keys, self._token, _LOCK_MS, self._saved.revision, *arguments
            )
        if verdict != b"written":
            raise CatalogueError(f"another coordinator has the catalogue {self._name}; stop one of the two")
        revision: str = found.decode()
        return revision

    def _note_loss(self, found: str) -> bool:
        """Logs an error when Redis had an older revision than the last saved one. Returns whether the revisions
        differ."""
        if found == self._saved.revision:
            return False
        number = found.partition(" ")[0] or "0"
        if int(number) < self._saved.number:
            log.error(
                "%s lost the cluster's state: it had revision %s instead of %d and is given the state in memory",
                self._name, number, self._saved.number,
            )  # fmt: skip
        return True
