"""Reports of workers whose KV differs from a canary, for operators. Kept in memory only."""

import threading
import time
from collections import OrderedDict

from kvstore_cluster.canaries.base import Origin, Refusal
from kvstore_cluster.canaries.document import bounded

MAX_MODELS, MAX_OF_A_MODEL = 1024, 16
MAX_MESSAGE_BYTES = 512


class Refusals:
    """Recent refusals by model. Thread-safe. Repeated reports of one worker increase its count, even from another
    process id. Keeps the last MAX_OF_A_MODEL workers of each model, and the last MAX_MODELS models."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: OrderedDict[bytes, OrderedDict[Origin, Refusal]] = OrderedDict()

    def add(self, model_digest: bytes, generation: int, origin: Origin, message: str) -> None:
        origin = bounded(origin)
        message = message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")
        who = Origin(origin.model_id, origin.host, 0, origin.software, origin.device, origin.dtype)
        with self._lock:
            found = self._models.setdefault(model_digest, OrderedDict())
            before = found.pop(who, None)
            times = before.times + 1 if before is not None else 1
            found[who] = Refusal(origin, generation, message, time.time(), times)
            self._models.move_to_end(model_digest)
            while len(found) > MAX_OF_A_MODEL:
                found.popitem(last=False)
            while len(self._models) > MAX_MODELS:
                self._models.popitem(last=False)

    def of(self, model_digest: bytes) -> tuple[Refusal, ...]:
        """Refusals of a model, the latest last."""
        with self._lock:
            return tuple(self._models.get(model_digest, {}).values())

    def forget(self, model_digest: bytes) -> None:
        with self._lock:
            self._models.pop(model_digest, None)
