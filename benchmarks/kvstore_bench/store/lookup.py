"""Measures lookups of a thousand chunks: the node's reply without and with headers, and the client's whole lookup."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.cluster_view import ClusterView
from kvstore_client.connector import Connector
from kvstore_client.lookup import find_prefix, release
from kvstore_client.metrics import ClientMetrics
from kvstore_client.settings import ClientSettings
from kvstore_client.transport import Transports
from kvstore_codec.chunk import write_header
from kvstore_codec.codec import chunk_geometry
from kvstore_codec.encoding import Encoding
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId, chunk_ids
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec

Release = Callable[[], object]

CHUNKS = 1000
_CALLS = 20
_WARM_UP = 5
_TIMEOUT_S = 30.0
_ENCODING = "exact-raw"
# The shape of SmolLM2-135M.
_SPEC = ModelSpec(
    model_id="bench",
    weights_digest=bytes(32),
    layers=30,
    kv_heads=3,
    head_dim=64,
    dtype=KVDtype.BFLOAT16,
    rope=RopeSpec("default", 10000.0, 64, ()),
)


def measure_lookups(address: str, rounds: int) -> list[dict[str, Any]]:
    """Measures lookups at the server that printed `address`. Returns rows {system, op, chunks, clients, p50_ms, p99_ms,
    operations}."""
    storage, bulk, coordinator = address.split(",")
    ids = chunk_ids(_SPEC.digest, b"", [token % 49_000 for token in range(CHUNKS * CHUNK_TOKENS)])
    refs = list(map(chunk_ref, ids))
    settings = ClientSettings(
        address=coordinator,
        encoding=_ENCODING,
        accept=(_ENCODING,),
        routes={},
        lookup_timeout_s=_TIMEOUT_S,  # a slow lookup is a result, not a miss
    )
    metrics = ClientMetrics()
    view = ClusterView(settings)
    transports = Transports(settings, Connector(settings.security))
    with grpc.insecure_channel(storage, [("grpc.max_receive_message_length", 64 << 20)]) as channel:
        stub = rpc.StorageStub(channel)
        transport = transports.to(Member("node-0", storage, bulk_endpoint=bulk), channel)
        statuses = [reply.status for reply in transport.put(_steps(ids), _TIMEOUT_S)]
        if statuses != [pb.PUT_STATUS_STORED] * CHUNKS:
            raise RuntimeError("the chunks to look up were not stored")

        def ask(*, with_headers: bool) -> Release:
            request = pb.LookupRequest(
                chunks=refs, encodings=[_ENCODING], lease_ms=1000, with_headers=with_headers
            )
            reply = stub.Lookup(request, timeout=_TIMEOUT_S)
            if not all(answer.encoding for answer in reply.answers):
                raise RuntimeError(f"not all of {CHUNKS} chunks were found")
            lease = pb.ReleaseLeaseRequest(lease_id=reply.lease_id)
            return lambda: stub.ReleaseLease(lease, timeout=_TIMEOUT_S)

        def find() -> Release:
            match = find_prefix(view, settings, metrics, lambda _: None, _SPEC, ids)
            if len(match.chunks) != CHUNKS:
                raise RuntimeError(f"only {len(match.chunks)} of {CHUNKS} chunks were found")
            return lambda: release(view, match.leases)

        try:
            ways: dict[str, Callable[[], Release]] = {
                "lookup": lambda: ask(with_headers=False),
                "lookup+headers": lambda: ask(with_headers=True),
                "find_prefix": find,
            }
            for way in ways.values():
                for _ in range(_WARM_UP):
                    _took_s(way)
            times: dict[str, list[float]] = {op: [] for op in ways}
            for _ in range(rounds):
                for op, way in ways.items():
                    times[op] += [_took_s(way) for _ in range(_CALLS)]
        finally:
            transports.close()
            view.close()
            stub.Delete(pb.DeleteRequest(chunks=refs), timeout=_TIMEOUT_S)
    return [_row(op, seconds) for op, seconds in times.items()]


def _steps(ids: list[ChunkId]) -> Iterator[pb.PutRequest | memoryview]:
    """The messages of a put of these chunks. Each is valid and has the header of a real chunk. Its frames are short,
    because nothing reads them."""
    encoding = Encoding.parse(_ENCODING)
    geometry = chunk_geometry(_SPEC, CHUNK_TOKENS, encoding)
    frames = [bytes(16)] * geometry.frame_count
    for chunk_id in ids:
        header, data = write_header(_SPEC.digest, chunk_id, encoding, geometry, frames)
        ref = chunk_ref(chunk_id)
        start = pb.PutStart(chunk=ref, encoding=_ENCODING, size_bytes=header.size_bytes)
        yield pb.PutRequest(start=start)
        yield memoryview(data + b"".join(frames))
        yield pb.PutRequest(end=pb.PutEnd())


def _took_s(call: Callable[[], Release]) -> float:
    """Seconds of the lookup. Its leases are released afterwards, untimed."""
    begin = time.perf_counter()
    release_leases = call()
    took_s = time.perf_counter() - begin
    release_leases()
    return took_s


def _row(op: str, seconds: list[float]) -> dict[str, Any]:
    times_ms = sorted(1000 * took_s for took_s in seconds)
    return {
        "system": "kvstore",
        "op": op,
        "chunks": CHUNKS,
        "clients": 1,
        "p50_ms": statistics.median(times_ms),
        "p99_ms": times_ms[int(0.99 * len(times_ms))],
        "operations": len(times_ms),
    }
