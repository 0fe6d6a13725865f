"""vLLM's OpenAI server with the connector, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.vllm.processes import free_port

_START_LIMIT_S = 300


def save_tokenizer(folder: Path, tokens: int) -> None:
    """A tokenizer whose words are the numbers of its tokens."""
    words = {str(number): number for number in range(tokens)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder)  # noqa: S106


class ServerProcess:
    def __init__(self, folder: Path, model: Path, connector: dict[str, Any], *arguments: str) -> None:
        """Start the server and wait until it answers. `connector` is `kv_connector_extra_config`."""
        transfer = {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "kvstore_client.engines.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": connector,
        }
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "server.log"
        options = ("--port", str(port), "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager")
        command = (
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            *options,
        )
        environment = os.environ | {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOG_STATS_INTERVAL": "1",
        }
        with self._log.open("wb") as file:
            self._process = subprocess.Popen(
                (*command, "--kv-transfer-config", json.dumps(transfer), *arguments),
                stdout=file,
                stderr=file,
                env=environment,
            )
        deadline = time.monotonic() + _START_LIMIT_S
        while not self._answers():
            assert self._process.poll() is None, self.log()[-4000:]
            assert time.monotonic() < deadline, self.log()[-4000:]
            time.sleep(0.2)

    def complete(self, prompt: Sequence[int], max_tokens: int = 4) -> dict[str, Any]:
        asked = {"model": self._model(), "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}
        body = json.dumps(asked).encode()
        request = urllib.request.Request(  # noqa: S310  # the URL is this process's own server
            f"{self.url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            told: dict[str, Any] = json.load(answer)
        return told

    def metrics(self) -> dict[str, float]:
        """What a scrape finds: the values by name, summed over engines, with the other labels but the model's."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self._get("/metrics")):
            for sample in family.samples:
                labels = {k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")}
                told = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
                name = f"{sample.name}{{{told}}}"
                found[name] = found.get(name, 0) + sample.value
        return found

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._process.wait()

    def _model(self) -> str:
        (model,) = json.loads(self._get("/v1/models"))["data"]
        name: str = model["id"]
        return name

    def _answers(self) -> bool:
        try:
            self._get("/health")
        except (URLError, OSError):
            return False
        return True

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:  # noqa: S310
            told: bytes = answer.read()
        return told.decode()
