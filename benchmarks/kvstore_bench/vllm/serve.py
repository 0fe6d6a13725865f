"""vLLM's OpenAI server with a real model and the connector: `make serve-vllm`.

    python -m kvstore_bench.vllm.serve [--store HOST:PORT] [--model FOLDER] [--port 8000]

Starts a store on this machine unless one is given. Prints a request to try. Ctrl-C ends everything that it started.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kvstore_bench.models import QWEN, model_folder
from kvstore_bench.native_dtype import native_dtype
from kvstore_bench.vllm.engine import START_S, VLLM_PYTHON, vllm_environment
from kvstore_bench.vllm.policies import kvstore_connector
from kvstore_bench.vllm.process import ServerProcess, accepts_connections, free_port
from kvstore_bench.vllm.script import run_script
from kvstore_client.cache_dir import default_cache_dir
from kvstore_codec.errors import StartupError
from kvstore_service.models import SMOLLM2

_STORE_START_S = 120.0
_CHECK_S = 0.5
_HOST = "127.0.0.1"


def main(
    model: Annotated[
        str, typer.Option(help=f"{SMOLLM2}, {QWEN}, or a folder with a model in safetensors files.")
    ] = SMOLLM2,
    store: Annotated[
        str | None, typer.Option(help="host:port of a running store. Default: one is started.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of vLLM's OpenAI server.")] = 8000,
    settings: Annotated[
        str, typer.Option(help="JSON with further settings of the connector (docs/engines/vllm.md).")
    ] = "{}",
    max_model_len: Annotated[int, typer.Option(help="Longest prompt and answer together.")] = 8192,
) -> None:
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-serve-")))
        _serve(stack, logs, model, store, port, json.loads(settings), max_model_len)


def _serve(
    stack: ExitStack,
    logs: Path,
    model: str,
    store: str | None,
    port: int,
    settings: dict[str, object],
    max_model_len: int,
) -> None:
    if not VLLM_PYTHON.exists():
        raise StartupError("vLLM is not installed: make vllm-env")
    if accepts_connections(_HOST, port):
        raise StartupError(f"something listens on port {port} already; choose another --port")
    print("preparing the model", flush=True)
    folder = model_folder(model)
    if store is None:
        print("starting a store", flush=True)
        store = _start_store(stack, logs)
    connector = kvstore_connector(store, default_cache_dir(), settings)
    command = (
        *(str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--host", _HOST, "--port", str(port)),
        *("--model", str(folder), "--served-model-name", folder.name, "--dtype", native_dtype()),
        *("--max-model-len", str(max_model_len), "--enable-prompt-tokens-details"),
        *("--kv-transfer-config", json.dumps(dict(connector.transfer))),
    )
    print(f"starting vLLM with {folder.name} (the first time takes minutes)", flush=True)
    server = ServerProcess("vllm", command, logs / "vllm.log", vllm_environment(VLLM_PYTHON))
    stack.callback(server.close)
    server.wait_until(lambda: accepts_connections(_HOST, port), START_S)
    print(_words(store, port, folder.name), flush=True)
    while not server.has_ended():
        time.sleep(_CHECK_S)
    raise StartupError(f"vLLM ended:\n{server.log_end()}")


def _start_store(stack: ExitStack, logs: Path) -> str:
    found = shutil.which("kvstore", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    port = free_port()
    command = (found or "kvstore", "serve", "--listen", f"{_HOST}:{port}", "--memory", "1gib")
    process = ServerProcess("the store", command, logs / "store.log", os.environ)
    stack.callback(process.close)
    process.wait_until(lambda: accepts_connections(_HOST, port), _STORE_START_S)
    return f"{_HOST}:{port}"


def _words(store: str, port: int, model: str) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is a KV cache?"}],
        "max_tokens": 64,
    }
    return f"""
vLLM answers on http://{_HOST}:{port}, and its KV is in the store at {store}. Try it:

  curl http://{_HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'

Reuse shows with prompts of more than 256 tokens: `prompt_tokens_details` in the answer has the tokens that were not
computed, also after vLLM was started again. What the store has:  kvstore status --address {store}
Ctrl-C ends it.
"""


if __name__ == "__main__":
    run_script("serve-vllm", main)
