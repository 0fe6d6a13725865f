"""Calibrations: downloaded once per machine, then read from its disk."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
from blake3 import blake3

from kvstore_api.calibrations import DIGEST_BYTES, MAX_CALIBRATION_BYTES, MAX_PIECE_BYTES
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.grpc_failure import predicate_of
from kvstore_client.kept_file import replace_file
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.settings import ClientSettings
from kvstore_codec.errors import PublishError


class Calibrations:
    """The cluster's calibration registry, and this machine's cache of it in `<cache_dir>/calibrations`, which any
    number of processes share. Thread-safe.

    A calibration is a byte string here. What `load` returns always has the requested digest, whatever its source.
    """

    def __init__(self, view: ClusterView, settings: ClientSettings, metrics: ClientMetrics) -> None:
        self._view = view
        self._settings = settings
        self._metrics = metrics
        self._folder = settings.cache_dir / "calibrations"
        self._lock = threading.Lock()
        self._downloads: set[grpc.Call] = set()
        self._closed = False

    def close(self) -> None:
        """Read only from the cache from now on, and abort downloads in progress."""
        with self._lock:
            self._closed = True
            downloads = list(self._downloads)
        for call in downloads:
            call.cancel()

    def find(self, model_digest: bytes) -> bytes | None:
        """Digest of the model's newest calibration. None when the model has none, or when the registry does not answer
        within `lookup_timeout_s`; that is counted as `calibration_...`, and the registry is not asked again for a
        while."""
        request = pb.FindCalibrationRequest(model_digest=model_digest)
        if not self._may_ask(model_digest):
            return None
        try:
            reply = self._view.coordinator().FindCalibration(
                request, timeout=self._settings.timeouts.lookup_s
            )
        except grpc.RpcError as error:
            self._failed(model_digest, MissReason.of_calibration(error.code().name), predicate_of(error))
            return None
        digest: bytes = reply.digest
        if digest and len(digest) != DIGEST_BYTES:
            self._failed(
                model_digest,
                MissReason.CALIBRATION_PROTOCOL,
                f"answered with a digest of {len(digest)} bytes",
            )
            return None
        self._view.recovered(_pause_key(model_digest))
        return digest or None

    def load(self, digest: bytes) -> bytes | None:
        """The calibration with this digest, from the disk if it is there, else from the registry within
        `calibration_timeout_s`. None when it is unavailable; the reason is counted as `calibration_...`."""
        path = self._folder / f"{digest.hex()}.kvcal"
        data = self._read(path, digest)
        if data is None and self._may_ask(digest):
            data = self._fetch(digest)
            if data is not None:
                self._keep(path, data)
        return data

    def publish(self, data: bytes, model_digest: bytes, *, timeout_s: float = 600.0) -> bytes:
        """Make `data` the newest calibration of a model and return its digest. An operator's action, so unlike the
        others it raises: PublishError with the registry's reason."""
        digest = blake3(data).digest()
        if self._closed:
            raise PublishError(f"calibration {digest.hex()[:12]} was not published: this client is closed")
        info = pb.CalibrationInfo(digest=digest, model_digest=model_digest, size_bytes=len(data))
        try:
            self._view.coordinator().PutCalibration(_steps(info, data), timeout=timeout_s)
        except grpc.RpcError as error:
            raise PublishError(
                f"calibration {digest.hex()[:12]} was not accepted by {self._settings.address}: "
                f"{error.code().name}: {error.details()}"
            ) from error
        return digest

    def _fetch(self, digest: bytes) -> bytes | None:
        call = self._view.coordinator().GetCalibration(
            pb.GetCalibrationRequest(digest=digest), timeout=self._settings.timeouts.calibration_s
        )
        with self._lock:
            self._downloads.add(call)
            if self._closed:
                call.cancel()
        data = io.BytesIO()
        try:
            for reply in call:
                data.write(reply.data)
                if data.tell() > MAX_CALIBRATION_BYTES:
                    self._failed(
                        digest,
                        MissReason.CALIBRATION_TOO_LARGE,
                        f"sent more than {MAX_CALIBRATION_BYTES} bytes",
                    )
                    return None
        except grpc.RpcError as error:
            closed = MissReason.CALIBRATION_CLOSED if self._closed else None
            reason = closed or MissReason.of_calibration(error.code().name)
            self._failed(digest, reason, predicate_of(error))
            return None
        finally:
            call.cancel()
            with self._lock:
                self._downloads.discard(call)
        if blake3(data.getbuffer()).digest() != digest:
            self._failed(digest, MissReason.CALIBRATION_DAMAGED, "sent bytes of another digest")
            return None
        self._view.recovered(_pause_key(digest))
        self._metrics.received(data.tell())
        return data.getvalue()

    def _read(self, path: Path, digest: bytes) -> bytes | None:
        """Read a calibration from the cache. A damaged file is deleted, so that it is downloaded again."""
        try:
            data = path.read_bytes()
            if blake3(data).digest() == digest:
                return data
            self._metrics.missed(
                MissReason.CALIBRATION_CACHE_DAMAGED, detail=f"{path} is damaged and is downloaded again"
            )
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._metrics.missed(
                MissReason.CALIBRATION_CACHE_UNREADABLE, detail=f"{path} cannot be read: {error.strerror}"
            )
        return None

    def _keep(self, path: Path, data: bytes) -> None:
        """Write a calibration to the cache. Not synced: every read verifies. Processes that write the same file replace
        each other's."""
        try:
            replace_file(path, data)
        except OSError as error:
            self._metrics.missed(
                MissReason.CALIBRATION_CACHE_UNWRITABLE,
                detail=f"{self._folder} cannot be written ({error.strerror}), so every process downloads its "
                "calibrations again; set KVSTORE_CACHE_DIR to a writable folder",
            )

    def _may_ask(self, digest: bytes) -> bool:
        paused = MissReason.CALIBRATION_PAUSED if self._view.is_paused(_pause_key(digest)) else None
        reason = MissReason.CALIBRATION_CLOSED if self._closed else paused
        if reason is not None:
            self._metrics.missed(reason, detail=None)  # the cause was logged before
        return reason is None

    def _failed(self, digest: bytes, reason: MissReason, what: str) -> None:
        """Record a failure; `what` says what the registry did."""
        detail = f"no calibration from the coordinator at {self._settings.address}, which {what}"
        self._metrics.missed(reason, detail=None if reason is MissReason.CALIBRATION_CLOSED else detail)
        self._view.pause(_pause_key(digest), detail)


def _pause_key(digest: bytes) -> str:
    # Not the coordinator's address: a slow or missing download does not affect the membership.
    return f"calibration {digest.hex()}"


def _steps(info: pb.CalibrationInfo, data: bytes) -> Iterator[pb.PutCalibrationRequest]:
    yield pb.PutCalibrationRequest(start=info)
    for begin in range(0, len(data), MAX_PIECE_BYTES):
        yield pb.PutCalibrationRequest(data=data[begin : begin + MAX_PIECE_BYTES])
