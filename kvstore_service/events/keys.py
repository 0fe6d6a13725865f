"""The CURVE keys by which subscribers of KV events are known."""

import threading
from collections import OrderedDict

from kvstore_api.kv_events import topic_of
from kvstore_codec.errors import MalformedRequestError, RequestError
from kvstore_service.identity import Access
from kvstore_service.identity.caller import ALL_TENANTS, Caller
from kvstore_service.identity.verbs import COORDINATOR, VERBS

_EVENTS = VERBS[f"/{COORDINATOR}/Events"]
KEY_BYTES = 32
MOST_KEYS = 4096
"""Subscribers that are known at a time. The one that was admitted first is forgotten for another one."""


class SubscriberKeys:
    """Public keys of subscribers, each shown by a caller with a valid credential, in a gRPC call. Thread-safe."""

    def __init__(self, access: Access, most: int = MOST_KEYS) -> None:
        self._access, self._most = access, most
        self._lock = threading.Lock()
        self._callers: OrderedDict[bytes, Caller] = OrderedDict()

    def admit(self, key: bytes, caller: Caller) -> None:
        """Raises MalformedRequestError for what is no key, or the key of another caller."""
        if len(key) != KEY_BYTES:
            raise MalformedRequestError(
                f"this cluster tells KV events only to known subscribers: curve_key must have {KEY_BYTES} bytes, "
                f"not {len(key)}"
            )
        with self._lock:
            known = self._callers.get(key)
            if known is not None and known.credential_id != caller.credential_id:
                raise MalformedRequestError("another caller has this curve_key; make a new key pair")
            self._callers[key] = caller
            if len(self._callers) > self._most:
                self._callers.popitem(last=False)

    def readable(self, key: bytes) -> str | None:
        """What the owner of a key may read: a tenant's topic, or ALL_TENANTS. None: nothing."""
        with self._lock:
            caller = self._callers.get(key)
        if caller is None:
            return None
        try:
            caller = self._access.confirm(caller)
            _EVENTS.require(caller)
        except RequestError:
            return None
        return ALL_TENANTS if caller.tenant is None else topic_of(caller.tenant).decode()

    def forget_revoked(self) -> bool:
        """Forgets keys whose credential has expired or was revoked. Returns whether there were any."""
        with self._lock:
            keys = list(self._callers)
        revoked = [key for key in keys if self.readable(key) is None]
        with self._lock:
            for key in revoked:
                self._callers.pop(key, None)
        return bool(revoked)
