"""LMCache: its server beside the engine, with Redis at the far end of the link as its second level."""

import json
import os
from pathlib import Path

from kvstore_bench.vllm.engine import Connector
from kvstore_bench.vllm.http_call import call
from kvstore_bench.vllm.process import ServerProcess, accepts_connections, free_port

L1_GIB = 1
_START_S = 300.0
_CLEAR_S = 60.0


def lmcache_connector(port: int) -> Connector:
    """The connector of an engine that uses LMCache's server at `port`. In this transfer mode the server reads and
    writes the engine's KV memory itself, without copies in the engine's process."""
    return Connector(
        {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": port,
                "lmcache.mp.mp_transfer_mode": "lmcache_driven",
            },
        },
        {"PYTHONHASHSEED": "0", "LMCACHE_TRACK_USAGE": "false"},
    )


class LMCacheServer:
    """LMCache's own server, with its defaults where it has any. Raises StartupError when it does not start."""

    def __init__(
        self, python: Path, folder: Path, name: str, redis_host: str, redis_port: int, serde: str | None
    ) -> None:
        """`serde` names LMCache's coding of what it stores in Redis; None: it is not coded."""
        self.port, self._http_port = free_port(), free_port()
        adapter: dict[str, object] = {"type": "resp", "host": redis_host, "port": redis_port}
        if serde is not None:
            adapter["serde"] = {"type": serde}
        command = (
            *(str(python), "-m", "lmcache.cli.main", "server"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--http-port", str(self._http_port), "--l1-size-gb", str(L1_GIB), "--eviction-policy", "LRU"),
            *("--l2-adapter", json.dumps(adapter)),
        )
        environment = os.environ | {"PYTHONHASHSEED": "0", "LMCACHE_TRACK_USAGE": "false"}
        self._process = ServerProcess(f"{name}-server", command, folder / f"{name}-server.log", environment)
        self._process.wait_until(
            lambda: (
                accepts_connections("127.0.0.1", self._http_port)
                and accepts_connections("127.0.0.1", self.port)
            ),
            _START_S,
        )

    def clear(self) -> None:
        """Empties its memory, so that the next hit comes from Redis. Raises RequestError."""
        call(self._http_port, "POST", "/cache/clear", {"tier": "l1"}, _CLEAR_S)

    def close(self) -> None:
        self._process.close()
