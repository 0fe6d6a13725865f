"""Processes that tests start: a store that can be killed and started again, and engines."""

import json
import multiprocessing
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Prompt = Sequence[int] | npt.NDArray[np.float32]
"""Tokens, or their embeddings, `[tokens, hidden_size]`."""

_STORE_PYTHON = str(
    Path(os.environ.get("KVSTORE_COMMAND", ".venv/bin/kvstore")).absolute().with_name("python")
)
"""Of the environment that storage nodes run in."""

_ENGINES = multiprocessing.get_context("forkserver")
_ENGINES.set_forkserver_preload(["tests.vllm.engine_process"])


class StoreProcess:
    """A store on a port of the coordinator's that stays the same when it is started again. It starts beside the caller,
    and answers each line of JSON with a line of JSON."""

    def __init__(self, folder: Path, port: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        self._log = folder / "store.log"
        with self._log.open("ab") as file:
            self._process = subprocess.Popen(
                (_STORE_PYTHON, "-m", "tests.vllm.store_process", str(folder / "store"), str(port)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                text=True,
            )

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

    def stats(self) -> dict[str, Any]:
        return self.ask()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(60)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self.kill()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, _ended(self._log)
        answer: dict[str, Any] = json.loads(line)
        return answer


class EngineProcess:
    """An engine that starts beside the caller, with a log in `folder`. `options` are `Engine`'s."""

    def __init__(self, folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for the function that reads blocks
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores
        }
        self._log = folder / "engine.log"
        self._log.touch()
        self._asked, its_end = _ENGINES.Pipe()
        self._process = _ENGINES.Process(target=_serve, args=(options, environment, self._log, its_end))
        self._process.start()
        its_end.close()

    @cached_property
    def started(self) -> dict[str, Any]:
        """What the engine tells when it has started."""
        return self._read()

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.started
        self._asked.send(command)
        return self._read()

    def close(self) -> None:
        self._asked.close()
        self._process.join(60)
        self._process.kill()
        self._process.join(60)

    def _read(self) -> dict[str, Any]:
        # The engine's other processes have its end of the pipe, too, so that end may outlive it.
        wait((self._asked, self._process.sentinel))
        assert self._asked.poll(), _ended(self._log)
        answer: dict[str, Any] = self._asked.recv()
        return answer

    def generate(
        self,
        *prompts: Prompt,
        salts: Sequence[str | None] = (),
        max_tokens: int = 8,
        logprobs: int | None = None,
        adapter: Sequence[Any] | None = None,
        scores: bool = False,
    ) -> dict[str, Any]:
        return self.ask(
            do="generate",
            prompts=prompts,
            salts=salts,
            max_tokens=max_tokens,
            logprobs=logprobs,
            adapter=adapter,
            scores=scores,
        )


def _serve(*arguments: Any) -> None:
    from tests.vllm.engine_process import serve  # it imports vLLM, which not all tests have

    serve(*arguments)


def _ended(log: Path) -> str:
    return f"the process has ended:\n{log.read_text(errors='replace')[-4000:]}"


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
