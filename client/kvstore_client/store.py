"""Storing chunks behind the engine's back: encode, then stream to the owners."""

import atexit
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.metrics import ClientMetrics
from kvstore_client.ready_calibrations import ReadyCalibrations
from kvstore_client.settings import ClientSettings
from kvstore_client.transport import PutStream
from kvstore_codec.codec import EncodedChunk, encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import CodecError, NodeUnavailableError, TransferError
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import ModelSpec

log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20


_STATUS_REASONS = {
    value: "store_" + name.removeprefix("PUT_STATUS_").lower() for name, value in pb.PutStatus.items()
}


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
        self.encoding = Encoding.parse(settings.encoding)
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._stop: Future[None] = Future()
        self._warned = False
        self._streams: set[PutStream] = set()
        self._waiting_bytes = 0
        # A daemon, so that a silent node cannot keep the interpreter from exiting; `close` has its own patience.
        self._worker = threading.Thread(target=self._work, name="kvstore-store", daemon=True)
        self._worker.start()
        atexit.register(self.close)

    @property
    def needs_features(self) -> bool:
        return self.encoding.needs_calibration

    def put(self, spec: ModelSpec, chunks: Sequence[NewChunk]) -> "Future[int]":
        """Store chunks without waiting. The future gives the number of chunks that are stored afterwards.

        When `store_backlog_bytes` of KV wait already, or the client was closed, new ones are dropped and counted.
        """
        size_bytes = len(chunks) * CHUNK_TOKENS * spec.kv_bytes_per_token
        stored: Future[int] = Future()
        with self._lock:
            full = (
                self._waiting_bytes and self._waiting_bytes + size_bytes > self._settings.store_backlog_bytes
            )
            reason = "store_closed" if self._closed else "store_backlog" if full else None
            if reason is None:
                self._waiting_bytes += size_bytes
                self._jobs.put(partial(self._store, stored, spec, list(chunks), size_bytes))
        if reason is not None:
            self._metrics.missed(reason)
            stored.set_result(0)
        return stored

    def flush(self) -> None:
        """Wait until everything handed in so far is stored or dropped."""
        if not self._closed:
            self._reached().result()

    def close(self) -> None:
        """Give what waits `close_timeout_s` to be stored, then drop it. Also called when the interpreter exits."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        _, late = wait([self._reached()], self._settings.close_timeout_s)
        if late:
            self._metrics.missed("store_dropped_at_close")
        self._stop.set_result(None)
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        self._jobs.put(None)
        self._worker.join()

    def _reached(self) -> "Future[None]":
        """Done when the worker has come this far."""
        reached: Future[None] = Future()
        self._jobs.put(partial(reached.set_result, None))
        return reached

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _store(self, stored: "Future[int]", spec: ModelSpec, chunks: list[NewChunk], size_bytes: int) -> None:
        count = 0 if self._stop.done() else self._put(spec, chunks)
        with self._lock:
            self._waiting_bytes -= size_bytes
        stored.set_result(count)

    def _put(self, spec: ModelSpec, chunks: list[NewChunk]) -> int:
        try:
            klt = self._calibration(spec) if self.encoding.needs_calibration else None
            if self.encoding.needs_calibration and klt is None:
                self._metrics.missed("store_no_calibration")
                return 0
            by_owner: dict[Member, list[NewChunk]] = {}
            for chunk in chunks:
                by_owner.setdefault(self._view.owner(chunk.chunk_id.content_id), []).append(chunk)
            return sum(self._put_to(member, spec, klt, owned) for member, owned in by_owner.items())
        except NodeUnavailableError:
            self._metrics.missed("store_unreachable")
            return 0
        except Exception:  # a mistake of ours; nobody waits for this, so it is said here
            log.exception("storing %d chunks failed", len(chunks))
            self._metrics.missed("store_internal_error")
            return 0

    def _calibration(self, spec: ModelSpec) -> KLT | None:
        """Waits `calibration_timeout_s` for it, and not longer than `close` lets the store live."""
        loading = self._ready.for_model(spec.digest)
        either: tuple[Future[Any], ...] = (loading, self._stop)
        wait(either, self._settings.calibration_timeout_s, return_when=FIRST_COMPLETED)
        klt = loading.result() if loading.done() else None
        if klt is None and not self._stop.done() and not self._warned:
            self._warned = True
            log.warning(
                "KV of %s in %s is not stored as %s: its calibration cannot be had from %s. "
                "Make one with `kvstore calibrate --dtype %s --publish %s`.",
                spec.model_id, spec.dtype, self.encoding.name, self._settings.address,
                spec.dtype, self._settings.address,
            )  # fmt: skip
        return klt

    def _put_to(self, member: Member, spec: ModelSpec, klt: KLT | None, chunks: list[NewChunk]) -> int:
        if self._stop.done() or self._view.is_paused(member.endpoint):
            self._metrics.missed("store_paused")
            return 0
        stored = answered = 0
        sizes: list[int] = []
        stream = self._view.transport(member).put(
            self._requests(spec, klt, chunks, sizes), self._settings.put_timeout_s
        )
        with self._lock:
            self._streams.add(stream)
        try:
            for index, reply in zip(range(len(chunks)), stream, strict=False):
                if reply.status in (pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED) and index < len(
                    sizes
                ):
                    stored += 1
                    self._metrics.stored(1, sizes[index])
                else:
                    self._metrics.missed(_STATUS_REASONS.get(reply.status, "store_protocol"))
                answered += 1
            if answered < len(sizes):
                self._metrics.missed("store_protocol")
        except TransferError as error:
            self._metrics.missed(f"store_{error.reason}")
            self._view.pause(member.endpoint)
            self._view.refresh()
        finally:
            stream.cancel()
            with self._lock:
                self._streams.discard(stream)
        return stored

    def _requests(
        self, spec: ModelSpec, klt: KLT | None, chunks: list[NewChunk], sizes: list[int]
    ) -> Iterator[pb.PutRequest | memoryview]:
        """The stream of one owner; chunks are encoded as the stream takes them, so one is in memory at a time."""
        for chunk in chunks:
            try:
                keys, values = chunk.gather()
                encoded = encode_chunk(
                    keys,
                    values,
                    spec=spec,
                    chunk_id=chunk.chunk_id,
                    encoding=self.encoding,
                    klt=klt,
                    features=chunk.features() if klt and chunk.features else None,
                    sinks=klt.calibration.sinks if klt and chunk.begins_text else 0,
                )
            except CodecError:
                self._metrics.missed("store_unencodable")
                continue
            self._metrics.guarded(encoded.guarded)
            sizes.append(encoded.size_bytes)
            yield from put_requests(encoded)


def put_requests(encoded: EncodedChunk) -> Iterator[pb.PutRequest | memoryview]:
    """One chunk as the steps of a Put stream; a memoryview is a piece of its bytes."""
    chunk_id = encoded.header.chunk_id
    yield pb.PutRequest(
        start=pb.PutStart(
            chunk=pb.ChunkRef(content_id=chunk_id.content_id, prefix_id=chunk_id.prefix_id),
            encoding=encoded.header.encoding.name,
            size_bytes=encoded.size_bytes,
            calibration=encoded.header.calibration or b"",
        )
    )
    for part in encoded.parts:
        view = memoryview(part)
        for begin in range(0, len(view), _PIECE_BYTES):
            yield view[begin : begin + _PIECE_BYTES]
    yield pb.PutRequest(end=pb.PutEnd())
