"""Storing chunks behind the engine's back: encode, then stream to the owners."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import torch

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.metrics import ClientMetrics
from kvstore_client.settings import ClientSettings
from kvstore_codec.codec import EncodedChunk, encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import CodecError, NodeUnavailableError
from kvstore_codec.identity import ChunkId
from kvstore_codec.model_spec import ModelSpec

log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_WAITING_CHUNKS = 512


@dataclass(frozen=True, slots=True)
class NewChunk:
    """KV to be stored. `gather` is called in the background and returns keys (before RoPE) and values,
    `[layers, kv_heads, tokens, head_dim]` each; until then it holds on to the tensors it needs."""

    chunk_id: ChunkId
    gather: Callable[[], tuple[torch.Tensor, torch.Tensor]]


class Store:
    """Takes new chunks and stores them in the background, one text after the other. Thread-safe.

    What cannot be stored is counted and dropped: the next worker prefills it again.
    """

    def __init__(self, view: ClusterView, settings: ClientSettings, metrics: ClientMetrics) -> None:
        self._view = view
        self._settings = settings
        self._metrics = metrics
        self._encoding = Encoding.parse(settings.encoding)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvstore-store")
        self._lock = threading.Lock()
        self._waiting_chunks = 0

    def put(self, spec: ModelSpec, chunks: Sequence[NewChunk]) -> "Future[int]":
        """Store chunks without waiting. The future gives the number of chunks that are stored afterwards.

        When more than a few hundred chunks wait already, new ones are dropped rather than held in memory.
        """
        with self._lock:
            if self._waiting_chunks + len(chunks) > _WAITING_CHUNKS and self._waiting_chunks:
                self._metrics.missed("store_backlog")
                dropped: Future[int] = Future()
                dropped.set_result(0)
                return dropped
            self._waiting_chunks += len(chunks)
        return self._worker.submit(self._put, spec, list(chunks))

    def flush(self) -> None:
        """Wait until everything handed in so far is stored or dropped."""
        self._worker.submit(lambda: None).result()

    def close(self) -> None:
        self._worker.shutdown(wait=True)

    def _put(self, spec: ModelSpec, chunks: list[NewChunk]) -> int:
        try:
            by_owner: dict[Member, list[NewChunk]] = {}
            for chunk in chunks:
                by_owner.setdefault(self._view.owner(chunk.chunk_id.content_id), []).append(chunk)
            return sum(self._put_to(member, spec, owned) for member, owned in by_owner.items())
        except NodeUnavailableError:
            self._metrics.missed("store_unreachable")
            return 0
        except Exception:  # a mistake of ours; nobody waits for this, so it is said here
            log.exception("storing %d chunks failed", len(chunks))
            self._metrics.missed("store_internal_error")
            return 0
        finally:
            with self._lock:
                self._waiting_chunks -= len(chunks)

    def _put_to(self, member: Member, spec: ModelSpec, chunks: list[NewChunk]) -> int:
        stored = 0
        sizes: list[int] = []
        try:
            replies = self._view.storage(member.endpoint).Put(
                self._requests(spec, chunks, sizes), timeout=self._settings.put_timeout_s
            )
            for index, reply in enumerate(replies):
                if reply.status in (pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED):
                    stored += 1
                    self._metrics.stored(1, sizes[index])
                else:
                    self._metrics.missed(
                        "store_" + pb.PutStatus.Name(reply.status)[len("PUT_STATUS_") :].lower()
                    )
        except grpc.RpcError as error:
            self._metrics.missed(f"store_rpc_{error.code().name.lower()}")
            self._view.refresh()
        return stored

    def _requests(
        self, spec: ModelSpec, chunks: list[NewChunk], sizes: list[int]
    ) -> Iterator[pb.PutRequest | memoryview]:
        """The stream of one owner; chunks are encoded as the stream takes them, so one is in memory at a time."""
        for chunk in chunks:
            try:
                keys, values = chunk.gather()
                encoded = encode_chunk(
                    keys, values, spec=spec, chunk_id=chunk.chunk_id, encoding=self._encoding
                )
            except CodecError:
                self._metrics.missed("store_unencodable")
                continue
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
        )
    )
    for part in encoded.parts:
        view = memoryview(part)
        for begin in range(0, len(view), _PIECE_BYTES):
            yield view[begin : begin + _PIECE_BYTES]
    yield pb.PutRequest(end=pb.PutEnd())
