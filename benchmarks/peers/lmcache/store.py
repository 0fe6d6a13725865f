"""LMCache's server (`lm://`) as a store of values, for `kvstore bench store`, through LMCache's own connector.

    .venv/bin/python store.py serve             starts the server, prints its address, runs until stdin ends
    .venv/bin/python store.py client ADDRESS    runs the loop in benchmarks/kvstore_bench/store/loop.py

Memory for received chunks is allocated before the measurement. The server does not acknowledge puts, so the time of a
put includes an EXIST request, which the server answers after the put. The server cannot delete values.
"""

import asyncio
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "kvstore_bench" / "store"))
os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
import loop
import ports
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector.lm_connector import LMCServerConnector

START_S = 60
TOKENS = 256


def main() -> None:
    if sys.argv[1] == "client":
        loop.serve(LMCache(sys.argv[2]))
        return
    port = ports.free_port()
    command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ports.wait_for(port, "LMCache's server", START_S)
        print(f"127.0.0.1:{port}", flush=True)
        sys.stdin.read()
    finally:
        server.kill()
        server.wait()


class WarmMemory:
    """Stands for an engine's CPU backend, which the connector needs: settings, and memory for one chunk, which is
    reused."""

    def __init__(self) -> None:
        self.config = LMCacheEngineConfig.from_defaults(chunk_size=TOKENS)
        self.metadata = LMCacheMetadata(
            model_name="bench",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(1, 2, TOKENS, 1, 64),
            chunk_size=TOKENS,
        )
        self._memory: TensorMemoryObj | None = None

    def allocate(self, shape: torch.Size, dtype: torch.dtype, fmt: MemoryFormat) -> TensorMemoryObj:
        if self._memory is None or self._memory.metadata.shape != shape:
            self._memory = memory_object(torch.zeros(shape, dtype=dtype), fmt)
        return self._memory


def memory_object(tensor: torch.Tensor, fmt: MemoryFormat) -> TensorMemoryObj:
    """A tensor as LMCache's CPU memory holds it."""
    metadata = MemoryObjMetadata(
        shape=tensor.shape, dtype=tensor.dtype, address=0, phy_size=tensor.nbytes, ref_count=1, fmt=fmt
    )
    return TensorMemoryObj(tensor.view(torch.uint8).flatten(), metadata, parent_allocator=None)


class LMCache:
    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        # Runs in this thread, so that the time includes no switch between threads.
        self._loop = asyncio.new_event_loop()
        self._connector = LMCServerConnector(host, int(port), self._loop, WarmMemory())
        # Otherwise the kernel delays the EXIST after a put by 40 ms, which the put itself does not need.
        self._connector.client_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def value(self, key: int, size_bytes: int, noise: random.Random) -> TensorMemoryObj:  # noqa: ARG002
        content = torch.frombuffer(bytearray(noise.randbytes(size_bytes)), dtype=torch.bfloat16)
        return memory_object(content.view(2, 1, TOKENS, -1), MemoryFormat.KV_2LTD)

    def content(self, value: TensorMemoryObj) -> bytes:
        return bytes(value.byte_array)

    def put(self, key: int, value: TensorMemoryObj) -> None:
        self._loop.run_until_complete(self._put(self._key(key), value))

    def get(self, key: int, size_bytes: int) -> memoryview:  # noqa: ARG002
        found = self._loop.run_until_complete(self._connector.get(self._key(key)))
        if found is None:
            raise KeyError(key)
        return memoryview(found.byte_array)

    def delete(self, key: int) -> None:
        """Does nothing: the server cannot delete, and the next put of the key replaces the value."""

    async def _put(self, key: CacheEngineKey, value: TensorMemoryObj) -> None:
        await self._connector.put(key, value)
        if not await self._connector.exists(key):
            raise RuntimeError("the value is not there after the put")

    def _key(self, key: int) -> CacheEngineKey:
        return CacheEngineKey("bench", 1, 0, key, torch.bfloat16)


if __name__ == "__main__":
    main()
