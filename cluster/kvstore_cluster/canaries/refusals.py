"""Reports of workers whose KV differs from a canary, for operators. Kept in memory only."""

import threading
import time
from collections import OrderedDict

from kvstore_cluster.canaries.base import Origin, Refusal
from kvstore_cluster.canaries.document import bounded

MAX_MODELS, MAX_OF_A_MODEL = 1024, 16
MAX_MESSAGE_BYTES = 512


class Refusals:
    """Recent refusals by tenant and model. Thread-safe. Repeated reports of one worker increase its count, even from
    another process id. Keeps the last MAX_OF_A_MODEL workers of each model, and MAX_MODELS models: one more takes the
    place of the oldest one of the tenant that has most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, OrderedDict[bytes, OrderedDict[Origin, Refusal]]] = {}
        self._count = 0

    def add(
        self, model_digest: bytes, generation: int, origin: Origin, message: str, tenant: str = ""
    ) -> None:
        origin = bounded(origin)
        message = message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")
        who = Origin(origin.model_id, origin.host, 0, origin.software, origin.device, origin.dtype)
        with self._lock:
            models = self._models.setdefault(tenant, OrderedDict())
            self._count += model_digest not in models
            found = models.setdefault(model_digest, OrderedDict())
            before = found.pop(who, None)
            times = before.times + 1 if before is not None else 1
            found[who] = Refusal(origin, generation, message, time.time(), times)
            models.move_to_end(model_digest)
            while len(found) > MAX_OF_A_MODEL:
                found.popitem(last=False)
            if self._count > MAX_MODELS:
                most = max(self._models, key=lambda name: len(self._models[name]))
                self._drop(most, next(iter(self._models[most])))

    def of(self, model_digest: bytes, tenant: str = "") -> tuple[Refusal, ...]:
        """Refusals of a tenant's model, the latest last."""
        with self._lock:
            found = self._models[tenant].get(model_digest) if tenant in self._models else None
            return () if found is None else tuple(found.values())

    def forget(self, model_digest: bytes, tenant: str = "") -> None:
        with self._lock:
            if model_digest in self._models.get(tenant, {}):
                self._drop(tenant, model_digest)

    def forget_tenant(self, tenant: str) -> None:
        """Drops all refusals of a tenant."""
        with self._lock:
            self._count -= len(self._models.pop(tenant, ()))

    def _drop(self, tenant: str, model_digest: bytes) -> None:
        del self._models[tenant][model_digest]
        if not self._models[tenant]:
            del self._models[tenant]
        self._count -= 1
