"""The latest fetches that workers reported to the coordinator."""

import threading
import time
from collections import Counter
from collections.abc import Callable

import grpc

from kvstore_api.printable import printable
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.spans import STAGES
from kvstore_cluster.names import MAX_TENANT_BYTES
from kvstore_codec.errors import MalformedRequestError
from kvstore_service.grpc_server import unary
from kvstore_service.identity import Access

MOST_FETCHES = 32
_MOST_SPANS = 64
_MOST_BYTES = 128
_LONGEST_S = 1e6


class FetchLog:
    """Serves `ReportFetch`, and keeps the last MOST_FETCHES reports. One more replaces the oldest one of the tenant
    with the most, so that no tenant can hide the fetches of the others. Thread-safe."""

    def __init__(self, access: Access, clock: Callable[[], float] = time.time) -> None:
        self._access, self._clock = access, clock
        self._lock = threading.Lock()
        self._fetches: list[pb.FetchSummary] = []

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {"ReportFetch": unary(self.report, pb.ReportFetchRequest)}

    @property
    def fetches(self) -> list[pb.FetchSummary]:
        """The latest ones, oldest first."""
        with self._lock:
            return list(self._fetches)

    def forget(self, tenant: str) -> None:
        """Drops the reports of a tenant."""
        with self._lock:
            self._fetches = [fetch for fetch in self._fetches if fetch.tenant != tenant]

    def report(self, request: pb.ReportFetchRequest, context: grpc.ServicerContext) -> pb.ReportFetchReply:
        tenant = self._access.tenant(context, request.tenant)
        fetch = request.fetch
        texts = (fetch.request_id, fetch.worker)
        if (
            any(len(text.encode()) > _MOST_BYTES for text in texts)
            or len(tenant.encode()) > MAX_TENANT_BYTES
            or len(fetch.spans) > _MOST_SPANS
        ):
            raise MalformedRequestError(
                f"a fetch has at most {_MOST_SPANS} spans, and texts of at most {_MOST_BYTES} bytes"
            )
        spans = [span for span in fetch.spans if span.stage in STAGES]
        times_s = [
            fetch.took_s,
            fetch.predicted_s,
            *(span.start_s for span in spans),
            *(s.end_s for s in spans),
        ]
        # Also refuses NaN, which JSON does not have.
        if not all(0 <= time_s <= _LONGEST_S for time_s in times_s):
            raise MalformedRequestError(f"the times of a fetch are between 0 and {_LONGEST_S:g} s")
        kept = pb.FetchSummary()
        kept.CopyFrom(fetch)
        kept.request_id, kept.worker = printable(fetch.request_id), printable(fetch.worker)
        kept.tenant, kept.ended_unix_s = tenant, self._clock()
        del kept.spans[:]
        kept.spans.extend(spans)
        with self._lock:
            self._fetches.append(kept)
            if len(self._fetches) > MOST_FETCHES:
                ((most, _),) = Counter(known.tenant for known in self._fetches).most_common(1)
                self._fetches.remove(next(known for known in self._fetches if known.tenant == most))
        return pb.ReportFetchReply()
