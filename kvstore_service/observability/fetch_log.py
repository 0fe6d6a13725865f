"""The latest fetches that workers reported to the coordinator."""

import threading
import time
from collections import deque
from collections.abc import Callable

import grpc

from kvstore_api.printable import printable
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.spans import STAGES
from kvstore_codec.errors import MalformedRequestError
from kvstore_service.grpc_server import unary
from kvstore_service.identity import Access

MOST_FETCHES = 32
_MOST_SPANS = 64
_MOST_BYTES = 128


class FetchLog:
    """Serves `ReportFetch`, and keeps the last MOST_FETCHES reports. Thread-safe."""

    def __init__(self, access: Access, clock: Callable[[], float] = time.time) -> None:
        self._access, self._clock = access, clock
        self._lock = threading.Lock()
        self._fetches: deque[pb.FetchSummary] = deque(maxlen=MOST_FETCHES)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {"ReportFetch": unary(self.report, pb.ReportFetchRequest)}

    @property
    def fetches(self) -> list[pb.FetchSummary]:
        """The latest ones, oldest first."""
        with self._lock:
            return list(self._fetches)

    def report(self, request: pb.ReportFetchRequest, context: grpc.ServicerContext) -> pb.ReportFetchReply:
        tenant = self._access.tenant(context, request.tenant)
        fetch = request.fetch
        texts = (fetch.request_id, fetch.worker, tenant)
        if any(len(text.encode()) > 2 * _MOST_BYTES for text in texts) or len(fetch.spans) > _MOST_SPANS:
            raise MalformedRequestError(
                f"a fetch has at most {_MOST_SPANS} spans, and texts of at most {_MOST_BYTES} bytes"
            )
        kept = pb.FetchSummary()
        kept.CopyFrom(fetch)
        kept.request_id, kept.worker = printable(fetch.request_id), printable(fetch.worker)
        kept.tenant, kept.ended_unix_s = tenant, self._clock()
        del kept.spans[:]
        kept.spans.extend(span for span in fetch.spans if span.stage in STAGES)
        with self._lock:
            self._fetches.append(kept)
        return pb.ReportFetchReply()
