"""An honest client of a flooded service: what it asks for, and how long each answer takes."""

import contextlib
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import grpc
from flood_target import Target

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.transport import BulkTransport, Connections, GrpcTransport, ReceiveMemory
from kvstore_codec.errors import TransferError
from tests.sample_chunk import SampleChunk, sample_chunk
from tests.service.bulk_port import ref

_TIMEOUT_S = 10.0
_PERIOD_S = 0.02
_NEW_CONNECTION_PERIOD_S = 0.5


@dataclass(frozen=True)
class Answer:
    """One request: when it began (monotonic), how long it took, and why it failed, or an empty text."""

    kind: str
    begun_s: float
    took_s: float
    failure: str = ""


class Client:
    """One connection to each port of a node, and requests over it, which raise TransferError and grpc.RpcError."""

    def __init__(self, target: Target) -> None:
        connector = target.connector("honest")
        self._channel = connector.channel(target.ports["node"], [("grpc.use_local_subchannel_pool", 1)])
        self._stub = rpc.StorageStub(self._channel)
        host, _, port = target.ports["bulk"].rpartition(":")
        connections = Connections(host, int(port), connector.tls_context, host, token=connector.token)
        self._bulk = BulkTransport(connections, ReceiveMemory(), GrpcTransport(self._channel))

    def put(self, chunk: SampleChunk) -> None:
        start = pb.PutStart(chunk=ref(chunk), encoding=chunk.encoding, size_bytes=len(chunk.data))
        steps = iter((pb.PutRequest(start=start), memoryview(chunk.data), pb.PutRequest(end=pb.PutEnd())))
        (reply,) = self._bulk.put(steps, _TIMEOUT_S)
        if reply.status not in (pb.PUT_STATUS_STORED, pb.PUT_STATUS_ALREADY_STORED):
            raise TransferError("put", pb.PutStatus.Name(reply.status))

    def lookup(self, chunk: SampleChunk) -> None:
        request = pb.LookupRequest(chunks=[ref(chunk)], encodings=[chunk.encoding], lease_ms=1000)
        if not self._stub.Lookup(request, timeout=_TIMEOUT_S).answers[0].encoding:
            raise TransferError("lookup", "a chunk that was just stored was not found")

    def get(self, chunk: SampleChunk) -> None:
        request = pb.ReadRequest(chunks=[ref(chunk)], encodings=[chunk.encoding], ranges=[pb.ReadRange()])
        data = b"".join(piece.data for piece in self._bulk.read(request, _TIMEOUT_S))
        if not data:
            raise TransferError("get", "a chunk that was just stored is gone")
        if data != chunk.data:
            raise TransferError("get", "other bytes came back")

    def close(self) -> None:
        self._bulk.close()
        self._channel.close()


def be_honest(target: Target, parent: Connection) -> None:
    """The process of the honest client: stores, looks up and reads chunks, and twice a second does the same on new
    connections and reads the metrics. Whenever `parent` sends something, it gets the answers since the last time."""
    answers: list[Answer] = []
    client = Client(target)
    next_new_s = time.monotonic()
    number = 0
    parent.send("ready")
    while True:
        if parent.poll():
            parent.recv()
            parent.send(answers)
            answers = []
        begun_s = time.monotonic()
        # The same ones again, so that the node's memory does not grow with the run.
        chunk, number = sample_chunk(number % 512, frame_bytes=500), number + 1
        _all_of(client, chunk, "", answers)
        if begun_s >= next_new_s:
            next_new_s = begun_s + _NEW_CONNECTION_PERIOD_S
            with contextlib.closing(Client(target)) as new:
                _all_of(new, chunk, " on a new connection", answers)
            answers.append(_timed("metrics", lambda: _read_metrics(target)))
        time.sleep(max(0.0, begun_s + _PERIOD_S - time.monotonic()))


def _all_of(client: Client, chunk: SampleChunk, how: str, answers: list[Answer]) -> None:
    answers += [
        _timed(kind + how, partial(ask, chunk))
        for kind, ask in (("put", client.put), ("lookup", client.lookup), ("get", client.get))
    ]


def _timed(kind: str, ask: Callable[[], None]) -> Answer:
    begun_s = time.monotonic()
    failure = ""
    try:
        ask()
    except grpc.RpcError as error:
        failure = f"{error.code().name}: {error.details()}"
    except (TransferError, OSError) as error:
        failure = f"{type(error).__name__}: {error}"
    return Answer(kind, begun_s, time.monotonic() - begun_s, failure[:200])


def _read_metrics(target: Target) -> None:
    url = f"https://{target.ports['metrics']}/metrics"
    headers = {"Authorization": f"Bearer {target.tokens['prometheus']}"}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=target.context()) as reply:  # noqa: S310
        if b"kvstore_node_up" not in reply.read():
            raise OSError("the metrics do not name the node")


def between(answers: list[Answer], begin_s: float, end_s: float) -> Iterator[Answer]:
    return (answer for answer in answers if begin_s <= answer.begun_s < end_s)
