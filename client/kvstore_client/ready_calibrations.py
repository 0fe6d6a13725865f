"""Loaded calibrations: downloaded and built in the background, then kept in memory."""

import atexit
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from kvstore_client.calibrations import Calibrations
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.settings import ClientSettings
from kvstore_client.threads import single_threaded
from kvstore_codec.calibration import Calibration
from kvstore_codec.errors import CodecError
from kvstore_codec.klt_frames import KLT

log = logging.getLogger(__name__)

Loading = Future[KLT | None]


class ReadyCalibrations:
    """Every calibration that this client has met, as a KLT, kept as long as the client lives. Thread-safe.

    Nothing here blocks: a calibration that is not loaded is loaded in a thread of its own, and the caller gets a future
    or None. A failed load is counted as `calibration_...` and repeated at the next request, with the pauses of
    `Calibrations`. Bytes that are not a calibration are not read again.
    """

    def __init__(self, calibrations: Calibrations, settings: ClientSettings, metrics: ClientMetrics) -> None:
        self._calibrations = calibrations
        self._settings = settings
        self._metrics = metrics
        self._lock = threading.Lock()
        self._ready: dict[bytes, KLT] = {}
        self._newest: dict[bytes, bytes] = {}  # model digest -> latest known calibration digest
        self._unusable: set[bytes] = set()
        self._loading: dict[bytes, Loading] = {}  # by the digest of the calibration, or of the model
        self._threads: set[threading.Thread] = set()
        self._closed = False
        # The interpreter must not exit while one of these threads is inside torch.
        atexit.register(self.close)

    def klt(self, digest: bytes) -> KLT | None:
        """The calibration with this digest if it is loaded. Otherwise None, and loading starts."""
        with self._lock:
            ready = self._ready.get(digest)
        if ready is None:
            self._start(digest, self._load)
        return ready

    def for_model(self, model_digest: bytes) -> Loading:
        """The model's newest calibration, or the newest known one while the registry is unreachable. The future's
        result is None when there is none, or none arrives within `lookup_timeout_s` and `calibration_timeout_s`."""
        return self._start(model_digest, self._load_newest)

    def inherit(self, parents: "ReadyCalibrations") -> None:
        """In a forked child: take over the parent's loaded calibrations."""
        self._ready.update(parents._ready)
        self._newest.update(parents._newest)

    def close(self) -> None:
        """Abort downloads, and wait for work that cannot be aborted, a second or two each."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            threads = list(self._threads)
        atexit.unregister(self.close)
        self._calibrations.close()
        for thread in threads:
            thread.join(self._settings.timeouts.close_s)

    def _start(self, digest: bytes, load: Callable[[bytes], KLT | None]) -> Loading:
        with self._lock:
            known = self._loading.get(digest)
            if known is not None:
                return known
            loading: Loading = Future()
            loading.set_running_or_notify_cancel()  # shared by all callers: nobody can cancel it
            if self._closed or digest in self._unusable:
                loading.set_result(None)
                return loading
            thread = threading.Thread(
                target=self._run, args=(digest, load, loading), name="kvstore-calibration", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # this process has no thread left
                self._metrics.missed(
                    MissReason.CALIBRATION_NO_RESOURCES,
                    detail="this process has no thread left to load a calibration",
                )
                loading.set_result(None)
                return loading
            self._loading[digest] = loading
            self._threads.add(thread)
            return loading

    @single_threaded()
    def _run(self, digest: bytes, load: Callable[[bytes], KLT | None], loading: Loading) -> None:
        klt = None
        try:
            klt = load(digest)
        except Exception:  # a bug in this package must not leave anybody waiting
            log.exception("loading calibration %s failed", digest.hex()[:12])
            self._metrics.missed(MissReason.CALIBRATION_INTERNAL_ERROR)
        finally:
            with self._lock:
                self._loading.pop(digest, None)
                self._threads.discard(threading.current_thread())
            loading.set_result(klt)

    def _load_newest(self, model_digest: bytes) -> KLT | None:
        digest = self._calibrations.find(model_digest) or self._newest.get(model_digest)
        if digest is None:
            return None
        self._newest[model_digest] = digest
        with self._lock:
            ready = self._ready.get(digest)
        klt = ready or self._start(digest, self._load).result()
        if klt is not None and klt.calibration.model_digest != model_digest:
            self._metrics.missed(
                MissReason.CALIBRATION_FOREIGN,
                detail=f"calibration {digest.hex()[:12]}, named by the registry, belongs to another model",
            )
            return None
        return klt

    def _load(self, digest: bytes) -> KLT | None:
        data = self._calibrations.load(digest)
        if data is None or self._closed:
            return None
        try:
            klt = KLT(Calibration.from_bytes(data))
        except CodecError as error:
            log.warning("calibration %s cannot be used: %s", digest.hex()[:12], error)
            self._metrics.missed(MissReason.CALIBRATION_UNUSABLE)
            with self._lock:
                self._unusable.add(digest)
            return None
        with self._lock:
            self._ready[digest] = klt
        return klt
