"""A cluster with credentials, with real servers, all in this process."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from pydantic import SecretStr

from kvstore_api.frames import PREFACE, FrameKind, pack_header
from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.connector import Connector
from kvstore_client.settings import SecuritySettings
from kvstore_cluster.arena import Arena
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.node import StorageNode
from kvstore_service.bulk_server import BulkServer, serve_bulk
from kvstore_service.grpc_coordinator import CoordinatorServer, serve_coordinator
from kvstore_service.grpc_server import GrpcServer
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.identity import Credential, Scope, new_token
from kvstore_service.identity.credential import token_digest
from kvstore_service.identity.file import changing
from kvstore_service.listen import Address
from kvstore_service.security import Security
from kvstore_service.settings import settings_of
from tests.sample_chunk import SampleChunk

HOST = "127.0.0.1"


class SecuredCluster:
    """One coordinator and one storage node."""

    def __init__(self, folder: Path, **settings: object) -> None:
        """`settings` are further ones of the service, such as those of TLS."""
        self.file = folder / "credentials.json"
        with changing(self.file):
            pass
        self.security = Security.of_cluster(settings_of(credentials=self.file, **settings))
        self._running = contextlib.ExitStack()
        self.access, tls = self.security.access(), self.security.server_tls()
        self.node = StorageNode("node-0", Arena(16 << 20, 4 << 10), isolated=True)
        self.bulk: BulkServer = serve_bulk(self.node, host=HOST, access=self.access, tls=tls)
        self._running.callback(self.bulk.stop, 0)
        self.storage: GrpcServer = serve_storage(
            self.node, host=HOST, bulk_endpoint=self.bulk.address, access=self.access, tls=tls
        )
        self._running.callback(self.storage.stop, 0)
        catalogue = FileCatalogue(folder / "catalogue")
        self._running.callback(catalogue.close)
        self.coordinator = Coordinator(catalogue, isolated=True)
        self._running.callback(self.coordinator.close)
        self._member = Member("node-0", self.storage.address, 1.0, self.bulk.address)
        self.hear()
        self.canaries = CanaryRegistry(folder / "canaries")
        self.front: CoordinatorServer = serve_coordinator(
            self.coordinator,
            CalibrationRegistry(folder / "calibrations"),
            self.canaries,
            address=Address(HOST, 0),
            security=self.security,
        )
        self._running.callback(self.front.stop, 0)

    def hear(self) -> None:
        """Lets the node register and apply what the coordinator says of forgotten tenants, as it does each second."""
        heard = self.coordinator.register(self._member, 1, 0, self.node.forgotten_generation)
        self.node.forget(heard.forgotten)

    def token(
        self, tenant: str | None, *scopes: Scope, name: str = "caller", lifetime_s: float = 3600
    ) -> str:
        """The token of a new credential."""
        made_id, token = new_token()
        credential = Credential(
            made_id,
            name,
            tenant,
            frozenset(scopes or (Scope.DATA,)),
            token_digest(token),
            expires_unix_s=time.time() + lifetime_s,
        )
        with changing(self.file) as known:
            known.append(credential)
        self.refresh()
        return token

    def revoke(self, token: str) -> None:
        with changing(self.file) as known:
            known[:] = [one for one in known if one.token_digest != token_digest(token)]
        self.refresh()

    def refresh(self) -> None:
        """Puts a change of the file into effect now."""
        for access in (self.access, self.front._access):
            assert access._file is not None
            access._file.refresh()

    def channel(self, address: str, token: str = "", **settings: object) -> grpc.Channel:
        """A channel of a client with this token and further security settings."""
        given = SecuritySettings.model_validate({"token": SecretStr(token)} | settings)
        return self._running.enter_context(Connector(given).channel(address))

    def nodes(self, token: str = "", **settings: object) -> rpc.StorageStub:
        """A stub of the storage node."""
        return rpc.StorageStub(self.channel(self.storage.address, token, **settings))

    def coordinators(self, token: str = "", **settings: object) -> rpc.CoordinatorStub:
        return rpc.CoordinatorStub(self.channel(self.front.address, token, **settings))

    @contextlib.contextmanager
    def bulk_connection(self, token: str = "") -> Iterator[socket.socket]:
        host, _, port = self.bulk.address.rpartition(":")
        with socket.create_connection((host, int(port)), 5) as connected:
            connected.sendall(PREFACE)
            if token:
                connected.sendall(pack_header(FrameKind.TOKEN, len(token)) + token.encode())
            yield connected

    def close(self) -> None:
        self._running.close()
        self.node.check_integrity()


def ref(chunk: SampleChunk) -> pb.ChunkRef:
    return pb.ChunkRef(content_id=chunk.chunk_id.content_id, prefix_id=chunk.chunk_id.prefix_id)


def put_steps(chunk: SampleChunk, tenant: str = "") -> list[pb.PutRequest]:
    start = pb.PutStart(chunk=ref(chunk), encoding=chunk.encoding, size_bytes=len(chunk.data), tenant=tenant)
    return [pb.PutRequest(start=start), pb.PutRequest(data=chunk.data), pb.PutRequest(end=pb.PutEnd())]


def code_of(call: grpc.Future) -> grpc.StatusCode:
    """How a call with one answer ends."""
    call.exception()
    return call.code()


def code_of_stream(call: grpc.Call) -> grpc.StatusCode:
    """How a call with many answers ends."""
    with contextlib.suppress(grpc.RpcError):
        list(call)
    return call.code()
