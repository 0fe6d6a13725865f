"""Storing chunks behind the engine's back: encode in every wanted encoding, then stream to the owners."""

import atexit
import logging
import multiprocessing.util
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from kvstore_client.cluster_view import ClusterView
from kvstore_client.grpc_failure import unreachable
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.owner_write import OutgoingChunk, keep_as
from kvstore_client.ready_calibrations import ReadyCalibrations
from kvstore_client.recompute.frequency import token_order
from kvstore_client.replicated_write import ReplicatedWrite
from kvstore_client.settings import ClientSettings
from kvstore_client.texts import TextPlaces
from kvstore_client.threads import single_threaded
from kvstore_codec.codec import EncodedChunk, encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import CodecError, NodeUnavailableError
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import ModelSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NewChunk:
    """KV to be stored. `gather` is called in the background and returns keys (before RoPE) and values,
    `[layers, kv_heads, tokens, head_dim]` each; until then it holds on to the tensors it needs."""

    chunk_id: ChunkId
    gather: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    features: Callable[[], torch.Tensor] | None = None
    """`token_features` of the chunk's tokens, f32 `[tokens, features]` in host memory, called in the background. What
    an encoding with a calibration needs besides the KV; `Store.needs_features` says whether it will be asked for."""
    begins_text: bool = False
    """Whether nothing stands before it: its first tokens are those that everything attends to."""
    cost: float = 0.0
    """Of computing it again; 0: as much as its tokens. It should not grow along a text, although the computing does:
    the end is worth nothing without the beginning, and would outlive it."""
    document: int = 0
    """Of what is put together, each document is a text of its own: a node that has no room for all of it keeps its
    beginning, and what is behind that is not encoded in vain."""


@dataclass(frozen=True, slots=True)
class _NewChunks:
    """What was handed in together."""

    chunks: list[NewChunk]
    encodings: tuple[Encoding, ...]
    text: tuple[ChunkId, ...]

    def texts(self) -> dict[int, Sequence[ChunkId]]:
        """By document the chunks of its text, in order."""
        documents: dict[int, list[ChunkId]] = {}
        for chunk in self.chunks:
            documents.setdefault(chunk.document, []).append(chunk.chunk_id)
        return {document: self.text or ids for document, ids in documents.items()}


class Store:
    """Takes new chunks and stores them in the background, one text after the other. Thread-safe.

    What cannot be stored is counted and dropped: the next worker prefills it again.
    """

    def __init__(
        self,
        view: ClusterView,
        ready: ReadyCalibrations,
        settings: ClientSettings,
        metrics: ClientMetrics,
    ) -> None:
        self._view = view
        self._ready = ready
        self._settings = settings
        self._metrics = metrics
        self.encodings = tuple(map(Encoding.parse, settings.encodings.stored))
        """What new chunks are stored in, unless a `put` says otherwise."""
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._stop: Future[None] = Future()
        self._warned = False
        self._writing: ReplicatedWrite | None = None
        self._waiting_bytes = 0
        self._worker: threading.Thread | None = None
        atexit.register(self.close)

    @property
    def needs_features(self) -> bool:
        return any(encoding.needs_calibration for encoding in self.encodings)

    def encodings_behind(self, fetched: Collection[Encoding]) -> tuple[Encoding, ...]:
        """Those of its encodings in which KV may be stored that was computed behind KV fetched in these: an encoding
        that is more faithful than what its KV was computed from would promise too much."""
        return tuple(mine for mine in self.encodings if all(map(mine.may_follow, fetched)))

    def put(
        self,
        spec: ModelSpec,
        chunks: Sequence[NewChunk],
        encodings: Sequence[Encoding] | None = None,
        *,
        text: Sequence[ChunkId] = (),
    ) -> "Future[int]":
        """Store chunks without waiting, each in all of `encodings` (when not given, the store's). The future gives the
        number of chunks that are stored afterwards, in one of them at least: a fetch can use those. `text` names all
        chunks of the text that they belong to, in order, where they are not all of it. Cancelling the future drops
        chunks whose turn has not come; those under way are stored.

        When `store_backlog_bytes` of KV wait already, or the client was closed, new ones are dropped and counted.
        """
        size_bytes = len(chunks) * CHUNK_TOKENS * spec.kv_bytes_per_token
        stored: Future[int] = Future()
        with self._lock:
            full = (
                self._waiting_bytes and self._waiting_bytes + size_bytes > self._settings.store.backlog_bytes
            )
            reason = MissReason.STORE_CLOSED if self._closed else MissReason.STORE_BACKLOG if full else None
            if reason is None:
                wanted = self.encodings if encodings is None else tuple(encodings)
                new = _NewChunks(list(chunks), wanted, tuple(text))
                try:
                    self._hand_over(partial(self._store, stored, spec, new, size_bytes))
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
        """Wait until everything handed in so far is stored or dropped. During a `close`, as long as that takes."""
        with self._lock:
            worker = self._worker
            reached = None if worker is None or self._closed else self._reached()
        if reached is not None:
            reached.result()
        elif worker is not None:
            worker.join()

    def close(self) -> None:
        """Give what waits `close_timeout_s` to be stored, then drop it. Also called when the interpreter exits."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        if self._worker is None:
            return
        _, late = wait([self._reached()], self._settings.timeouts.close_s)
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

    def _hand_over(self, job: Callable[[], object]) -> None:
        """With the lock held. The worker begins with the first job: a client that stores nothing needs no thread.
        Raises RuntimeError where none can be had."""
        if self._worker is None:
            # A daemon, so that a silent node cannot keep the interpreter from exiting; `close` has its own patience.
            worker = threading.Thread(target=self._work, name="kvstore-store", daemon=True)
            worker.start()
            self._worker = worker
            # A child that multiprocessing has forked or spawned ends without what atexit knows.
            self._finalizer = multiprocessing.util.Finalize(None, self.close, exitpriority=0)
        self._jobs.put(job)

    def _reached(self) -> "Future[None]":
        """Done when the worker has come this far. It never does behind the end that `close` puts there: who is not
        `close` calls this with the lock held, while the store is open."""
        reached: Future[None] = Future()
        self._jobs.put(partial(reached.set_result, None))
        return reached

    @single_threaded()
    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except (
                BaseException
            ):  # of a caller's: from a `gather`, or from a callback of a future that it holds
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
        except Exception:  # a mistake of ours; nobody waits for this, so it is said here
            log.exception("storing %d chunks failed", len(new.chunks))
            self._metrics.missed(MissReason.STORE_INTERNAL_ERROR)
            return 0

    def _calibration(self, spec: ModelSpec, encodings: Sequence[Encoding]) -> KLT | None:
        """Waits `calibration_timeout_s` for it, and not longer than `close` lets the store live."""
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
        """Encode each chunk once in each encoding and send it to all its owners; how many chunks have one copy at
        least in one of them. What follows in a text that the nodes have cut is left out. Raises NodeUnavailableError
        when there is no node."""
        chunks, encodings = new.chunks, new.encodings
        placed = self._view.writers([chunk.chunk_id.content_id for chunk in chunks])
        texts = {
            document: TextPlaces(ids, self._view.writers([chunk_id.content_id for chunk_id in ids]))
            for document, ids in new.texts().items()
        }
        replicas = self._view.membership().replicas
        writing = ReplicatedWrite(self._view, self._settings)
        with self._lock:
            self._writing = writing
        sent: list[tuple[int, int]] = []  # (number of the chunk, bytes)
        try:
            for number, (chunk, owners) in enumerate(zip(chunks, placed, strict=True)):
                if self._stop.done() or not owners:
                    self._metrics.missed(MissReason.STORE_PAUSED)
                    continue
                text = texts[chunk.document]
                left = tuple(e for e in encodings if not writing.is_cut(text, e.name))
                if not left:
                    self._metrics.missed(MissReason.STORE_TEXT_CUT)
                    continue
                for encoded in self._encoded(spec, klt, chunk, left):
                    sent.append((number, encoded.size_bytes))
                    writing.put(OutgoingChunk.of(encoded, keep_as(self._settings, chunk.cost)), owners, text)
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
        for outcome, (number, size_bytes) in zip(written, sent, strict=True):
            for reason in outcome.refusals:
                detail = f"a storage node refused a chunk: {reason.removeprefix('store_')}"
                self._metrics.missed(reason, detail=detail)
            if outcome.copies:
                self._metrics.stored(int(number not in stored), outcome.copies * size_bytes)
                stored.add(number)
                if outcome.copies < replicas:
                    sparse.add(number)
        self._metrics.under_replicated(len(sparse))
        return len(stored)

    def _writes_order(self, spec: ModelSpec) -> bool:
        """Not under tensor parallelism: all ranks have to choose the same tokens, and one sees but its own heads."""
        return self._settings.recompute.selector.needs_order and spec.tp_size == 1

    def _encoded(
        self, spec: ModelSpec, klt: KLT | None, chunk: NewChunk, encodings: tuple[Encoding, ...]
    ) -> Iterator[EncodedChunk]:
        """The chunk in each encoding that it can be coded in, one after the other: the first is on its way already
        while the next is coded."""
        try:
            keys, values = chunk.gather()
            features = chunk.features() if klt and chunk.features else None
            order = token_order(keys, values) if self._writes_order(spec) else None
        except CodecError as error:
            self._unencodable(error)
            return
        for encoding in encodings:
            try:
                encoded = encode_chunk(
                    keys,
                    values,
                    spec=spec,
                    chunk_id=chunk.chunk_id,
                    encoding=encoding,
                    klt=klt,
                    features=features,
                    sinks=klt.calibration.sinks if klt and chunk.begins_text else 0,
                    token_order=order,
                )
            except CodecError as error:
                self._unencodable(error)
                continue
            self._metrics.guarded(encoded.guarded)
            yield encoded

    def _unencodable(self, error: CodecError) -> None:
        self._metrics.missed(MissReason.STORE_UNENCODABLE, detail=f"a chunk cannot be stored: {error}")
