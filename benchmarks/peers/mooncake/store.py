"""Mooncake's store over TCP, for `kvstore bench store`: its master, a process that provides memory, and clients.

    .venv/bin/python store.py serve             starts both, prints the master's address, runs until stdin ends
    .venv/bin/python store.py client ADDRESS    runs the loop in benchmarks/kvstore_bench/store/loop.py

Clients get into and put from registered buffers, the fastest documented interface.
"""

import ctypes
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "kvstore_bench" / "store"))
import loop
import ports
from mooncake.store import MooncakeDistributedStore

SEGMENT_BYTES = 1 << 30
BUFFER_BYTES = 64 << 20
START_S = 20
RECEIVED = -1
"""Key of the buffer that gets write to."""


def main() -> None:
    if sys.argv[1] == "client":
        store = Mooncake(sys.argv[2])
        print("ready", file=sys.stderr)
        loop.serve(store)
        # Its destructors wait for processes that may have ended already.
        os._exit(0)
    master_port, metrics_port = ports.free_port(), ports.free_port()
    binary = Path(sys.executable).parent / "mooncake_master"
    options = [f"--rpc_port={master_port}", f"--metrics_port={metrics_port}"]
    master = subprocess.Popen([str(binary), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ports.wait_for(master_port, "Mooncake's master", START_S)
        address = f"127.0.0.1:{master_port}"
        provider = connect(address, SEGMENT_BYTES)
        print(address, flush=True)
        sys.stdin.read()
        del provider
    finally:
        master.terminate()
        master.wait()
    os._exit(0)


def connect(master: str, segment_bytes: int) -> MooncakeDistributedStore:
    """Connects to the master. The process provides `segment_bytes` of memory for values. Clients provide none, so that
    every byte crosses TCP as with the other systems."""
    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, BUFFER_BYTES, "tcp", "", master)
    if code:
        sys.exit(f"Mooncake's setup failed with code {code}")
    return store


class Buffer:
    """Memory that is registered with Mooncake."""

    def __init__(self, store: MooncakeDistributedStore, size_bytes: int) -> None:
        self._memory = mmap.mmap(-1, size_bytes)
        self.view = memoryview(self._memory)
        self.view[:] = bytes(size_bytes)
        self.pointer = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        if store.register_buffer(self.pointer, size_bytes):
            raise RuntimeError("register_buffer failed")


class Mooncake:
    def __init__(self, master: str) -> None:
        self._store = connect(master, 0)
        self._buffers: dict[int, Buffer] = {}

    def value(self, key: int, size_bytes: int, noise: random.Random) -> Buffer:
        self._buffer(RECEIVED, size_bytes)
        buffer = self._buffer(key, size_bytes)
        buffer.view[:] = noise.randbytes(size_bytes)
        return buffer

    def content(self, value: Buffer) -> bytes:
        return bytes(value.view)

    def put(self, key: int, value: Buffer) -> None:
        code = self._store.put_from(f"chunk:{key}", value.pointer, len(value.view))
        if code:
            raise RuntimeError(f"put_from failed with code {code}")

    def get(self, key: int, size_bytes: int) -> memoryview:
        received = self._buffers[RECEIVED]
        count = self._store.get_into(f"chunk:{key}", received.pointer, size_bytes)
        if count != size_bytes:
            raise RuntimeError(f"get_into returned {count} instead of {size_bytes} bytes")
        return received.view

    def delete(self, key: int) -> None:
        code = self._store.remove(f"chunk:{key}", True)
        if code:
            raise RuntimeError(f"remove failed with code {code}")

    def _buffer(self, key: int, size_bytes: int) -> Buffer:
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer.view) != size_bytes:
            if buffer is not None:
                self._store.unregister_buffer(buffer.pointer)
            buffer = self._buffers[key] = Buffer(self._store, size_bytes)
        return buffer


if __name__ == "__main__":
    main()
