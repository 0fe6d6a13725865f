"""vLLM's OpenAI server, with or without a KV connector."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvstore_bench.vllm.completions import Completions
from kvstore_bench.vllm.process import ServerProcess, free_port
from kvstore_codec.errors import StartupError

ROOT = Path(__file__).parents[3]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
"""Made by `make vllm-env`."""

START_S = 600.0
"""How long a start may take. The first one compiles the model."""
_MODEL = "model"
_CPU_BLOCK_TOKENS = 128
"""vLLM's default on a CPU."""

_PRELOADED = ("lib/libiomp5.so",)
_TCMALLOC = "libtcmalloc_minimal.so.4"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How every compared engine runs."""

    model: Path
    """Folder with the weights in safetensors files."""
    max_model_tokens: int
    kv_cache_prompts: int = 2
    """How many of the longest prompts fit into the engine's own KV cache. Few, because all engines run at once."""
    dtype: str = "bfloat16"
    block_tokens: int = _CPU_BLOCK_TOKENS
    extra: tuple[str, ...] = ()
    """Further options of vLLM's server."""

    @property
    def kv_cache_blocks(self) -> int:
        return self.kv_cache_prompts * -(-self.max_model_tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class Connector:
    """What goes into `--kv-transfer-config`, and the environment variables that it needs."""

    transfer: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


class Engine:
    """A running server. Raises StartupError when it does not start."""

    def __init__(
        self, name: str, python: Path, options: EngineOptions, folder: Path, connector: Connector | None
    ) -> None:
        if not python.exists():
            raise StartupError(
                f"{python} is missing; README.md in benchmarks/peers and `make vllm-env` make it"
            )
        self.completions = Completions(free_port(), _MODEL)
        command = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"),
            *("--port", str(self.completions.port), "--model", str(options.model)),
            *("--served-model-name", _MODEL, "--dtype", options.dtype),
            *("--max-model-len", str(options.max_model_tokens), "--max-num-seqs", "16"),
            *("--block-size", str(options.block_tokens)),
            *("--num-gpu-blocks-override", str(options.kv_cache_blocks)),
            *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log", *options.extra),
        ]
        if connector is not None:
            command += ["--kv-transfer-config", json.dumps(dict(connector.transfer))]
        environment = vllm_environment(python)
        environment |= dict(connector.environment) if connector is not None else {}
        self._process = ServerProcess(name, command, folder / f"{name}.log", environment)

    def wait(self) -> None:
        """Blocks until it answers. Raises StartupError."""
        self._process.wait_until(self.completions.is_healthy, START_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        return self._process.has_ended()

    def log_end(self) -> str:
        return self._process.log_end()

    def close(self) -> None:
        self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def vllm_environment(python: Path) -> dict[str, str]:
    """Environment variables for vLLM, with the libraries preloaded that make it faster on a CPU."""
    venv = python.parent.parent
    libraries = [str(venv / name) for name in _PRELOADED if (venv / name).exists()]
    libraries += [str(found) for found in sorted(Path("/usr/lib").glob(f"*/{_TCMALLOC}"))[:1]]
    cores = os.cpu_count() or 1
    return os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "OMP_NUM_THREADS": str(cores),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # for the request that empties the engine's own prefix cache
        "HF_HUB_OFFLINE": "1",
    }


def installed_version(python: Path, package: str) -> str | None:
    """Version of a package in the environment of `python`, or None without it."""
    say = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        done = subprocess.run((python, "-c", say), check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
