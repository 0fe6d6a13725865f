"""HTTP client of vLLM's OpenAI server: streams a completion, and notes when its tokens arrive."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_bench.vllm.http_call import RequestError, answering, call

_BEFORE_NUMBER = "token_id:"
"""What vLLM writes before the number of a token."""
_WORKER_S = 300.0
"""A method of a worker that reads all of its KV memory takes a while."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion as the client saw it. Times count from the moment when the request was sent."""

    ttft_s: float
    total_s: float
    tokens: tuple[int, ...]
    reused_tokens: int
    """Tokens of the prompt that the engine did not compute."""

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None with fewer than two tokens."""
        if len(self.tokens) < 2:
            return None
        return (len(self.tokens) - 1) / (self.total_s - self.ttft_s)


@dataclass(frozen=True, slots=True)
class NextToken:
    """What the model expects behind a prompt."""

    log_probabilities: npt.NDArray[np.float64]
    """Of all tokens, `[vocabulary]`."""
    reused_tokens: int
    """Tokens of the prompt that the engine did not compute."""


class Completions:
    """vLLM's OpenAI server on this machine. Each request has a connection of its own, so threads may share this."""

    def __init__(self, port: int, model: str) -> None:
        self.port, self._model = port, model

    def complete(self, prompt: Sequence[int], max_tokens: int, silence_s: float) -> Answer:
        """The greedy answer to a prompt of token ids. Raises RequestError for an error, and when nothing arrives
        for `silence_s`."""
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        began_s = time.perf_counter()
        first_s = last_s = 0.0
        tokens: list[int] = []
        reused = 0
        for event in self._events(body, silence_s):
            for choice in event.get("choices", ()):
                if choice.get("token_ids"):
                    last_s = time.perf_counter()
                    first_s = first_s or last_s
                    tokens += choice["token_ids"]
            if usage := event.get("usage"):
                reused = _reused_tokens(usage)
        if not tokens:
            raise RequestError("the answer has no tokens")
        return Answer(first_s - began_s, last_s - began_s, tuple(tokens), reused)

    def next_token(self, prompt: Sequence[int], silence_s: float) -> NextToken:
        """The distribution of the token behind a prompt of token ids. The server must run with `--max-logprobs=-1`.
        Raises RequestError."""
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": -1,
            "return_tokens_as_token_ids": True,
        }
        answer = json.loads(call(self.port, "POST", "/v1/completions", body, silence_s))
        (found,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        log_probabilities = np.empty(len(found))
        for name, log_probability in found.items():
            log_probabilities[int(name.removeprefix(_BEFORE_NUMBER))] = log_probability
        return NextToken(log_probabilities, _reused_tokens(answer["usage"]))

    def forget(self) -> None:
        """Empties the engine's own prefix cache. Raises RequestError when it stays in use for 30 s."""
        for _ in range(300):
            if json.loads(call(self.port, "POST", "/reset_prefix_cache"))["success"]:
                return
            time.sleep(0.1)
        raise RequestError("vLLM did not empty its prefix cache within 30 s")

    def is_healthy(self) -> bool:
        try:
            call(self.port, "GET", "/health")
        except RequestError:
            return False
        return True

    def call_worker(self, method: str) -> Any:
        """What a method of the engine's only worker returns, a list or a dictionary. Raises RequestError. The
        methods that this project adds are in `worker_extension.py`."""
        answer = call(self.port, "POST", "/collective_rpc", {"method": method}, _WORKER_S)
        (result,) = json.loads(answer)["results"]
        return result

    def _events(self, body: Mapping[str, Any], silence_s: float) -> Iterator[dict[str, Any]]:
        with answering(self.port, "POST", "/v1/completions", body, silence_s) as response:
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if data and data != b"[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise RequestError(str(event["error"]))
                    yield event


def _reused_tokens(usage: Mapping[str, Any]) -> int:
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
