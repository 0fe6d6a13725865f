"""The status page of a cluster: `/` and `/status.json` at the port of the metrics."""

import base64
import hashlib
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.background import BackgroundLoop
from kvstore_codec.errors import ServiceError
from kvstore_service.observability import FILES
from kvstore_service.observability.overview import Observer, Overview

PATHS = ("/", "/status.json")
PERIOD_S = 5.0
"""Time between two observations of the cluster."""
_MOST_POINTS = 720
"""An hour of them."""
_MODELS_PERIOD_S = 60.0

StartResponse = Callable[[str, list[tuple[str, str]]], object]


class StatusPage:
    """A WSGI application. Between `start` and `stop` a thread observes the cluster; before, the page says so.
    Thread-safe."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, unix: Callable[[], float] = time.time
    ) -> None:
        self._clock, self._unix = clock, unix
        page = (FILES / "status.html").read_text(encoding="utf-8")
        self._page, self._policy = page.encode(), _content_policy(page)
        self._lock = threading.Lock()
        self._observer = Observer()
        self._points: deque[dict[str, float | None]] = deque(maxlen=_MOST_POINTS)
        self._told: dict[str, Any] = {"state": "starting"}
        self._models: Mapping[str, Any] = {}
        self._models_s = -_MODELS_PERIOD_S
        self._observing: BackgroundLoop | None = None

    def start(
        self,
        address: str,
        stats: Callable[[], pb.ClusterStatsReply],
        models: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """`stats` and `models` raise ServiceError when the cluster does not answer. `models` returns what is shown of
        models and calibrations, and is asked once a minute."""

        def observe() -> None:
            self.observe(address, stats, models)
            loop.stopping.wait(PERIOD_S)

        loop = self._observing = BackgroundLoop("kvstore-status-page", observe)
        loop.start()

    def stop(self) -> None:
        if self._observing is not None:
            self._observing.stop()

    def observe(
        self,
        address: str,
        stats: Callable[[], pb.ClusterStatsReply],
        models: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Looks at the cluster once. May block. For one thread."""
        now_s = self._clock()
        try:
            reply = stats()
            if now_s >= self._models_s + _MODELS_PERIOD_S:
                self._models, self._models_s = models(), now_s
        except ServiceError as error:
            with self._lock:
                self._told = {**self._told, "state": "lost", "error": str(error), "address": address}
            return
        overview = self._observer.observe(reply, now_s)
        with self._lock:
            self._points.append(_point(overview, self._unix()))
            self._told = {
                "state": "running",
                "address": address,
                "observed_unix_s": self._unix(),
                "overview": _overview(overview),
                "fetches": [_fetch(fetch) for fetch in reply.fetches],
                **self._models,
            }

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        headers = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
        if environ.get("PATH_INFO") == "/status.json":
            with self._lock:
                told = json.dumps({**self._told, "history": list(self._points)}).encode()
            start_response("200 OK", [("Content-Type", "application/json"), *headers])
            return [told]
        headers.append(("Content-Security-Policy", self._policy))
        start_response("200 OK", [("Content-Type", "text/html; charset=utf-8"), *headers])
        return [self._page]


def _content_policy(page: str) -> str:
    """Allows what is in the page and requests to where it came from, and nothing else."""
    digests = {
        tag: base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        for tag in ("style", "script")
        if (found := re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
    }
    inline = "; ".join(f"{tag}-src 'sha256-{digest}'" for tag, digest in digests.items())
    return f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; {inline}"


def _point(overview: Overview, at_unix_s: float) -> dict[str, float | None]:
    return {
        "at_unix_s": round(at_unix_s, 1),
        "hit_rate": overview.hit_rate,
        "in_Bps": overview.in_Bps,
        "out_Bps": overview.out_Bps,
    }


def _overview(overview: Overview) -> dict[str, Any]:
    told = asdict(overview)
    told["stored_bytes"] = [
        {"tier": tier, "encoding": encoding, "bytes": size}
        for (tier, encoding), size in overview.stored_bytes.items()
    ]
    return told


def _fetch(fetch: pb.FetchSummary) -> dict[str, Any]:
    return {
        "request_id": fetch.request_id,
        "worker": fetch.worker,
        "tenant": fetch.tenant,
        "ended_unix_s": fetch.ended_unix_s,
        "took_s": fetch.took_s,
        "predicted_s": fetch.predicted_s or None,
        "chunks": fetch.chunks,
        "delivered": fetch.delivered,
        "computed": fetch.computed,
        "bytes": fetch.size_bytes,
        "spans": [{"stage": s.stage, "start_s": s.start_s, "end_s": s.end_s} for s in fetch.spans],
    }
