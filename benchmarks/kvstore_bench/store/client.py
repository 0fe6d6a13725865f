"""Client process for this project's own servers. It runs the loop in `loop.py`.

python -m kvstore_bench.store.client SYSTEM ADDRESS

SYSTEM is kvstore, kvstore-disk, kvstore-encrypted, kvstore-tls, kvstore-mtls or raw-tcp.
"""

import random
import socket
import sys
from pathlib import Path

from kvstore_api.affinity import shared_where_local
from kvstore_api.byte_stream import ByteStream
from kvstore_bench.store import loop
from kvstore_bench.store.server import REQUEST, TIMEOUT_S


def main() -> None:
    system, address = sys.argv[1:]
    if system == "raw-tcp":
        loop.serve(RawTcp(address))
    else:
        from kvstore_bench.store.certificates import of_client
        from kvstore_bench.store.kvstore import KVStore
        from kvstore_client.connector import Connector

        storage, bulk, _, *folder = address.split(",")
        mutual = system == "kvstore-mtls"
        connector = Connector(of_client(Path(folder[0]), mutual=mutual)) if folder else Connector()
        loop.serve(KVStore(storage, bulk, connector))


class RawTcp:
    """Client of the `raw-tcp` server, which stores bytes without any protocol of a cache."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._stream = ByteStream(socket.create_connection((host, int(port))), shared_where_local)
        self._received = memoryview(b"")
        self._reply = bytearray(REQUEST.size)

    def value(self, key: int, size_bytes: int, noise: random.Random) -> bytes:  # noqa: ARG002
        if len(self._received) != size_bytes:
            self._received = memoryview(bytearray(size_bytes))
        return noise.randbytes(size_bytes)

    def content(self, value: bytes) -> bytes:
        return value

    def put(self, key: int, value: bytes) -> None:
        with self._stream.affinity.staying(anew=True):
            self._stream.send([REQUEST.pack(1, key, len(value)), value], TIMEOUT_S)
            self._stream.receive_into(self._reply, TIMEOUT_S)

    def get(self, key: int, size_bytes: int) -> memoryview:
        with self._stream.affinity.staying(anew=True):
            self._stream.send([REQUEST.pack(0, key, size_bytes)], TIMEOUT_S)
            self._stream.receive_into(self._received, TIMEOUT_S)
        return self._received

    def delete(self, key: int) -> None:
        """Does nothing, because a put overwrites the value of its key."""


if __name__ == "__main__":
    main()
