"""Processes that tests start: a store that can be killed and started again, and engines."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

_STORE_PYTHON = str(
    Path(os.environ.get("KVSTORE_COMMAND", ".venv/bin/kvstore")).absolute().with_name("python")
)
"""Of the environment that storage nodes run in."""


class _Process:
    """A child that answers each line of JSON with a line of JSON. It starts beside the caller."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                text=True,
            )
        self._log = log

    @cached_property
    def started(self) -> dict[str, Any]:
        """What the child tells when it has started."""
        return self._read()

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.started
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def kill(self) -> None:
        self._process.kill()
        self._end()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self.kill()

    def _end(self) -> None:
        self._process.wait(60)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process has ended:\n{self._log.read_text()[-4000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer


class StoreProcess(_Process):
    """A store on a port of the coordinator's that stays the same when it is started again."""

    def __init__(self, folder: Path, port: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        command = (_STORE_PYTHON, "-m", "tests.vllm.store_process", str(folder / "store"), str(port))
        super().__init__(command, folder / "store.log", environment)

    def stats(self) -> dict[str, Any]:
        return self.ask()


class EngineProcess(_Process):
    def __init__(self, folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for the function that reads blocks
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for answers
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores
        }
        command = (sys.executable, "-m", "tests.vllm.engine_process", json.dumps(options))
        super().__init__(command, folder / "engine.log", environment)

    def generate(
        self,
        *prompts: Sequence[int],
        salts: Sequence[str | None] = (),
        max_tokens: int = 8,
        logprobs: int | None = None,
        adapter: Sequence[Any] | None = None,
    ) -> dict[str, Any]:
        return self.ask(
            do="generate",
            prompts=prompts,
            salts=salts,
            max_tokens=max_tokens,
            logprobs=logprobs,
            adapter=adapter,
        )


def started_engine(folder: Path, model: Path, port: int, **options: Any) -> EngineProcess:
    """An engine that starts, with the store at this port of the machine. The folder is for its log and its caches."""
    connector = {"address": f"127.0.0.1:{port}", "cache_dir": str(folder / "cache"), "stall_timeout_s": 5}
    return EngineProcess(folder, model=str(model), connector=connector, **options)


def loaded(answer: dict[str, Any]) -> int:
    """How many tokens of the only prompt were not computed."""
    (cached,) = answer["cached"]
    return int(cached)


def loaded_after_forgetting(engine: EngineProcess, tokens: list[int]) -> int:
    engine.ask(do="forget")
    return loaded(engine.generate(tokens))


def until(condition: Callable[[], bool], limit_s: float = 120, pause_s: float = 0.02) -> None:
    """Wait for something that other processes do."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause_s)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def prompt(tokens: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(2, 512) for _ in range(tokens)]
