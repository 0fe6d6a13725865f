"""Background storing of chunks: encode each chunk in every wanted encoding, and stream it to its owners."""

import atexit
import logging
import multiprocessing.util
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

from kvstore_api.placement import Member
from kvstore_client.cluster_view import ClusterView
from kvstore_client.giving_way import GivingWay
from kvstore_client.grpc_failure import unreachable
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.new_chunk import NewChunk, NewChunkEncoder
from kvstore_client.owner_write import OutgoingChunk, keep_as
from kvstore_client.planning import Links
from kvstore_client.ready_calibrations import ReadyCalibrations
from kvstore_client.replicated_write import ReplicatedWrite
from kvstore_client.request_id import in_request
from kvstore_client.settings import ClientSettings
from kvstore_client.texts import TextPlaces
from kvstore_client.threads import run_apart
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import NodeUnavailableError
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import ModelSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _NewChunks:
    """The chunks of one `put`."""

    chunks: list[NewChunk]
    encodings: tuple[Encoding, ...]
    text: tuple[ChunkId, ...]
    text_begins: int
    queued_s: float
    """Monotonic time of the `put`."""

    def texts(self) -> dict[int, Sequence[ChunkId]]:
        """Chunk ids of each document's text, in order, by document."""
        documents: dict[int, list[ChunkId]] = {}
        for chunk in self.chunks:
            documents.setdefault(chunk.document, []).append(chunk.chunk_id)
        return {document: self.text or ids for document, ids in documents.items()}


class Store:
    """Stores new chunks in the background, one text after the other. Thread-safe.

    A chunk that cannot be stored is counted and dropped; the next worker prefills it again.
    """

    def __init__(
        self,
        view: ClusterView,
        ready: ReadyCalibrations,
        settings: ClientSettings,
        metrics: ClientMetrics,
        links: Links,
    ) -> None:
        self._view = view
        self._ready = ready
        self._giving_way = GivingWay(links, settings)
        self._encoder = NewChunkEncoder(settings, metrics, view.signatures)
        self._settings = settings
        self._metrics = metrics
        self.encodings = tuple(map(Encoding.parse, settings.encodings.stored))
        """Encodings of new chunks, unless a `put` names others."""
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._stop: Future[None] = Future()
        self._warned = False
        self._writing: ReplicatedWrite | None = None
        self._waiting_bytes = 0
        self._flushing = 0
        self._worker: threading.Thread | None = None
        atexit.register(self.close)

    @property
    def needs_features(self) -> bool:
        return any(encoding.needs_calibration for encoding in self.encodings)

    def has_room(self, size_bytes: int) -> bool:
        """Whether `put` would take that much KV now, so that nobody copies KV only to have it dropped."""
        with self._lock:
            return not self._closed and not self._would_overflow(size_bytes)

    def encodings_behind(self, fetched: Collection[Encoding]) -> tuple[Encoding, ...]:
        """Encodings in which KV may be stored that was computed behind KV fetched in the encodings `fetched`. An
        encoding must not be more faithful than the KV that its input was computed from."""
        return tuple(mine for mine in self.encodings if all(map(mine.may_follow, fetched)))

    def put(
        self,
        spec: ModelSpec,
        chunks: Sequence[NewChunk],
        encodings: Sequence[Encoding] | None = None,
        *,
        text: Sequence[ChunkId] = (),
        text_begins: int = 0,
    ) -> "Future[int]":
        """Queue chunks for storing, each in all of `encodings` (default: the store's), and return at once.

        The future's result is the number of chunks that are stored in at least one encoding, which is enough to fetch
        them. `text` names the chunks of the text in order, where `chunks` are only a part of it, from the text's chunk
        `text_begins` on. Cancelling the future drops queued chunks; chunks in progress are stored. Chunks are dropped
        and counted when `store_backlog_bytes` of KV are queued already, or when the client is closed.
        """
        size_bytes = len(chunks) * CHUNK_TOKENS * spec.kv_bytes_per_token
        stored: Future[int] = Future()
        with self._lock:
            full = self._would_overflow(size_bytes)
            reason = MissReason.STORE_CLOSED if self._closed else MissReason.STORE_BACKLOG if full else None
            if reason is None:
                wanted = self.encodings if encodings is None else tuple(encodings)
                new = _NewChunks(list(chunks), wanted, tuple(text), text_begins, time.monotonic())
                try:
                    self._enqueue(partial(self._store, stored, spec, new, size_bytes))
                    self._waiting_bytes += size_bytes
                except RuntimeError:
                    reason = MissReason.STORE_NO_RESOURCES
        if reason is not None:
            waiting = (
                f"{len(chunks)} chunks are not stored: {self._waiting_bytes} bytes wait already. The service takes "
                "them too slowly, or KVSTORE_STORE_BACKLOG_BYTES is too small"
            )
            details = {
                MissReason.STORE_BACKLOG: waiting,
                MissReason.STORE_NO_RESOURCES: "chunks are not stored: this process has no thread left to store them",
            }
            self._metrics.missed(reason, detail=details.get(reason))
            stored.set_result(0)
        return stored

    def flush(self) -> None:
        """Block until every chunk queued so far is stored or dropped, without waiting for the engine to be idle. During
        `close`, blocks as long as that takes."""
        with self._lock:
            worker = self._worker
            reached = None if worker is None or self._closed else self._barrier()
            self._flushing += 1
        try:
            if reached is not None:
                reached.result()
            elif worker is not None:
                worker.join()
        finally:
            with self._lock:
                self._flushing -= 1

    def close(self) -> None:
        """Store queued chunks for up to `close_timeout_s`, then drop the rest. Also runs at interpreter exit."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        if self._worker is None:
            return
        _, late = wait([self._barrier()], self._settings.timeouts.close_s)
        if late:
            self._metrics.missed(
                MissReason.STORE_DROPPED_AT_CLOSE,
                detail=f"chunks that were not stored within KVSTORE_CLOSE_TIMEOUT_S "
                f"({self._settings.timeouts.close_s:g} s) are dropped",
            )
        self._stop.set_result(None)
        with self._lock:
            writing = self._writing
        if writing is not None:
            writing.cancel()
        self._jobs.put(None)
        self._worker.join()
        self._finalizer.cancel()

    def _would_overflow(self, size_bytes: int) -> bool:
        """Whether queued KV would exceed `store_backlog_bytes`; the caller holds the lock. An empty queue takes any."""
        waiting = self._waiting_bytes
        return waiting > 0 and waiting + size_bytes > self._settings.store.backlog_bytes

    def _enqueue(self, job: Callable[[], object]) -> None:
        """Queue a job; the caller holds the lock. The first job starts the worker, so a client that stores nothing has
        no thread. Raises RuntimeError when no thread can be started."""
        if self._worker is None:
            # A daemon, so that a silent node cannot keep the interpreter from exiting; `close` has its own timeout.
            worker = threading.Thread(target=self._work, name="kvstore-store", daemon=True)
            worker.start()
            self._worker = worker
            # Children of multiprocessing exit without running atexit handlers.
            self._finalizer = multiprocessing.util.Finalize(None, self.close, exitpriority=0)
        self._jobs.put(in_request(job))

    def _barrier(self) -> "Future[None]":
        """A future that is done when the worker reaches this point of the queue. It is never done behind the end mark
        that `close` queues, so all other callers hold the lock while the store is open."""
        reached: Future[None] = Future()
        self._jobs.put(partial(reached.set_result, None))
        return reached

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:  # raised by a caller's `gather`, or by a callback of its future
                log.exception("storing failed")
                self._metrics.missed(MissReason.STORE_INTERNAL_ERROR)

    def _store(
        self,
        stored: "Future[int]",
        spec: ModelSpec,
        new: "_NewChunks",
        size_bytes: int,
    ) -> None:
        wanted, count = stored.set_running_or_notify_cancel(), 0
        try:
            if not wanted:
                self._metrics.missed(MissReason.STORE_CANCELLED)
            elif not self._stop.done():
                count = self._put(spec, new)
        finally:
            with self._lock:
                self._waiting_bytes -= size_bytes
            if wanted:
                stored.set_result(count)

    def _put(self, spec: ModelSpec, new: "_NewChunks") -> int:
        try:
            encodings = new.encodings
            klt, calibrated = None, [encoding for encoding in encodings if encoding.needs_calibration]
            if calibrated:
                klt = self._calibration(spec, calibrated)
                if klt is None:
                    self._metrics.missed(MissReason.STORE_NO_CALIBRATION)
                    encodings = tuple(encoding for encoding in encodings if encoding not in calibrated)
            return self._write(spec, klt, replace(new, encodings=encodings)) if encodings else 0
        except NodeUnavailableError as error:
            detail = unreachable(error, self._settings.address)
            self._metrics.missed(MissReason.STORE_UNREACHABLE, detail=detail, cause=str(error))
            return 0
        except Exception:  # a bug in this package; no caller waits, so it is logged here
            log.exception("storing %d chunks failed", len(new.chunks))
            self._metrics.missed(MissReason.STORE_INTERNAL_ERROR)
            return 0

    def _calibration(self, spec: ModelSpec, encodings: Sequence[Encoding]) -> KLT | None:
        """Wait for the model's calibration for `calibration_timeout_s`, and no longer than `close` allows."""
        loading = self._ready.for_model(spec.digest)
        either: tuple[Future[Any], ...] = (loading, self._stop)
        wait(either, self._settings.timeouts.calibration_s, return_when=FIRST_COMPLETED)
        klt = loading.result() if loading.done() else None
        if klt is None and not self._stop.done() and not self._warned:
            self._warned = True
            log.warning(
                "KV of %s in %s is not stored as %s: its calibration cannot be had from %s. "
                "Make one with `kvstore calibrate --dtype %s --publish %s`.",
                spec.model_id, spec.dtype, ", ".join(encoding.name for encoding in encodings), self._settings.address,
                spec.dtype, self._settings.address,
            )  # fmt: skip
        return klt

    def _write(self, spec: ModelSpec, klt: KLT | None, new: "_NewChunks") -> int:
        """Encode each chunk once per encoding and send it to all its owners. Returns the number of chunks that have at
        least one copy in at least one encoding. Skips the chunks of a text behind the point where nodes cut it. Raises
        NodeUnavailableError when the cluster has no node."""
        chunks, encodings = new.chunks, new.encodings
        placed = self._view.writers([chunk.chunk_id.content_id for chunk in chunks])
        texts = {
            document: TextPlaces(
                ids, self._view.writers([chunk_id.content_id for chunk_id in ids]), new.text_begins
            )
            for document, ids in new.texts().items()
        }
        replicas = self._view.membership().replicas
        writing = ReplicatedWrite(self._view, self._settings)
        with self._lock:
            self._writing = writing
        sent: list[tuple[int, Encoding, int]] = []  # (number of the chunk, encoding, bytes)

        def uncut(text: TextPlaces) -> tuple[Encoding, ...]:
            return tuple(e for e in encodings if not writing.is_cut(text, e.name))

        try:
            for number, (chunk, owners) in enumerate(zip(chunks, placed, strict=True)):
                if self._stop.done() or not owners:
                    self._metrics.missed(MissReason.STORE_PAUSED)
                    continue
                text = texts[chunk.document]
                if uncut(text):
                    self._give_way(new)
                left = uncut(text)
                if not left:
                    self._metrics.missed(MissReason.STORE_TEXT_CUT)
                    continue
                encode_and_send = partial(
                    self._encode_and_send, spec, klt, chunk, left, writing, owners, text
                )
                sent.extend((number, *one) for one in run_apart("kvstore-encode", encode_and_send))
        except BaseException:
            writing.cancel()
            raise
        finally:
            written = writing.finish()
            with self._lock:
                self._writing = None
        for reason, times in writing.failures.items():
            detail = None if reason is MissReason.STORE_CANCELLED else writing.details[reason]
            self._metrics.missed(reason, events=times, detail=detail)
        stored: set[int] = set()
        sparse: set[int] = set()
        for outcome, (number, encoding, size_bytes) in zip(written, sent, strict=True):
            for reason in outcome.refusals:
                detail = f"a storage node refused a chunk: {reason.removeprefix('store_')}"
                self._metrics.missed(reason, detail=detail)
            if outcome.copies:
                self._metrics.stored(int(number not in stored), outcome.copies * size_bytes, encoding)
                stored.add(number)
                if outcome.copies < replicas:
                    sparse.add(number)
        self._metrics.under_replicated(len(sparse))
        log.debug("%d of %d chunks were stored", len(stored), len(new.chunks))
        return len(stored)

    def _encode_and_send(
        self,
        spec: ModelSpec,
        klt: KLT | None,
        chunk: NewChunk,
        encodings: Sequence[Encoding],
        writing: ReplicatedWrite,
        owners: Sequence[Member],
        text: TextPlaces,
    ) -> list[tuple[Encoding, int]]:
        """Returns each encoding of the chunk, and its size in bytes."""
        sent = []
        for encoded in self._encoder.encoded(spec, klt, chunk, encodings):
            sent.append((encoded.header.encoding, encoded.size_bytes))
            keep = keep_as(self._settings, chunk.cost, self._view.signatures.take_refused(encoded.header))
            writing.put(OutgoingChunk.of(encoded, keep), owners, text)
        return sent

    def _give_way(self, new: "_NewChunks") -> None:
        """Wait for a pause of the engine, unless somebody waits for this thread."""
        self._giving_way.wait(
            len(new.chunks),
            new.queued_s,
            waiting_bytes=lambda: self._waiting_bytes,
            is_over=lambda: self._closed or self._flushing > 0,
        )
