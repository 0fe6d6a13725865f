"""A real storage node behind both of its real servers, and the ways to it."""

import contextlib
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.transport import BulkTransport, Connections, GrpcTransport, ReceiveMemory
from kvstore_cluster.arena import Arena
from kvstore_cluster.node import StorageNode
from kvstore_service.bulk_server import BulkServer
from kvstore_service.grpc_server import GrpcServer
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.listen import Address
from kvstore_service.tls import ServerTls, TlsFiles
from tests.sample_chunk import SampleChunk

HOST = "127.0.0.1"


@dataclass
class Files:
    certificate: Path
    key: Path


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tls")
    files = Files(folder / "certificate.pem", folder / "key.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    options = ["-days", "2", "-subj", "/CN=test", "-addext", f"subjectAltName=IP:{HOST}"]
    paths = ["-out", str(files.certificate), "-keyout", str(files.key)]
    try:
        subprocess.run([*command, *options, *paths], check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return files


class Served:
    """One node, its servers, and transports to it that are closed with it."""

    def __init__(self, tls: Files | None = None) -> None:
        self.node = StorageNode("node-0", Arena(64 << 20, 4 << 10))
        self._tls = tls
        self._context = ssl.create_default_context(cafile=tls.certificate) if tls else None
        self._stack = contextlib.ExitStack()
        self.grpc: GrpcServer = serve_storage(self.node, host=HOST)
        self._stack.callback(self.grpc.stop, 0)
        self.bulk = self.serve_bulk()

    def serve_bulk(self, port: int = 0, **options: float) -> BulkServer:
        tls = ServerTls(TlsFiles(self._tls.certificate, self._tls.key)) if self._tls else None
        server = BulkServer(self.node, Address(HOST, port), tls=tls, **options)  # type: ignore[arg-type]
        self._stack.callback(server.stop, 0)
        return server

    def over_grpc(self) -> GrpcTransport:
        return GrpcTransport(self._stack.enter_context(grpc.insecure_channel(self.grpc.address)))

    def over_bulk(self, fallback: GrpcTransport | None = None, address: str = "") -> BulkTransport:
        host, _, port = (address or self.bulk.address).rpartition(":")
        transport = BulkTransport(
            Connections(host, int(port), lambda: self._context, HOST), ReceiveMemory(), fallback
        )
        self._stack.callback(transport.close)
        return transport

    def close(self) -> None:
        self._stack.close()
        wait_until(lambda: self.node.stats().bytes_used >= 0)
        self.node.check_integrity()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


def ref(chunk: SampleChunk) -> pb.ChunkRef:
    return pb.ChunkRef(content_id=chunk.chunk_id.content_id, prefix_id=chunk.chunk_id.prefix_id)


def start(chunk: SampleChunk, size_bytes: int | None = None) -> pb.PutRequest:
    size_bytes = len(chunk.data) if size_bytes is None else size_bytes
    return pb.PutRequest(start=pb.PutStart(chunk=ref(chunk), encoding=chunk.encoding, size_bytes=size_bytes))


def data(chunk: SampleChunk, piece_bytes: int = 5000) -> Iterator[memoryview]:
    view = memoryview(chunk.data)
    for position in range(0, len(view), piece_bytes):
        yield view[position : position + piece_bytes]


END = pb.PutRequest(end=pb.PutEnd())
REVOKE = pb.PutRequest(revoke=pb.PutRevoke())


def steps(*chunks: SampleChunk) -> Iterator[pb.PutRequest | memoryview]:
    for chunk in chunks:
        yield start(chunk)
        yield from data(chunk)
        yield END


def read_request(chunks: list[SampleChunk], ranges: list[tuple[int, int, int]]) -> pb.ReadRequest:
    return pb.ReadRequest(
        chunks=[ref(chunk) for chunk in chunks],
        encodings=[chunk.encoding for chunk in chunks],
        ranges=[pb.ReadRange(chunk=c, first_frame=first, frame_count=count) for c, first, count in ranges],
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
