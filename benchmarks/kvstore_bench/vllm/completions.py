"""A user of vLLM's OpenAI server: streams a completion and notes when its tokens arrive."""

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


class CompletionError(Exception):
    """A request failed, or nothing arrived in time. The message says what."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion as the user saw it. Times count from the moment the request was sent."""

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


class Completions:
    """vLLM's OpenAI server on this machine. Each request has a connection of its own, so threads may share this."""

    def __init__(self, port: int, model: str) -> None:
        self.port, self._model = port, model

    def complete(self, prompt: Sequence[int], max_tokens: int, silence_s: float) -> Answer:
        """The greedy answer to a prompt of token ids. Raises CompletionError for an error, and when nothing arrives
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
        payload = json.dumps(body)
        began_s = time.perf_counter()
        first_s = last_s = 0.0
        tokens: list[int] = []
        reused = 0
        for event in self._events(payload, silence_s):
            for choice in event.get("choices", ()):
                if choice.get("token_ids"):
                    last_s = time.perf_counter()
                    first_s = first_s or last_s
                    tokens += choice["token_ids"]
            if usage := event.get("usage"):
                reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if not tokens:
            raise CompletionError("the answer has no tokens")
        return Answer(first_s - began_s, last_s - began_s, tuple(tokens), reused)

    def forget(self) -> None:
        """Empties the engine's own prefix cache. Raises CompletionError when it stays in use for 30 s."""
        for _ in range(300):
            if json.loads(self._call("POST", "/reset_prefix_cache"))["success"]:
                return
            time.sleep(0.1)
        raise CompletionError("vLLM did not empty its prefix cache within 30 s")

    def is_healthy(self) -> bool:
        try:
            self._call("GET", "/health")
        except CompletionError:
            return False
        return True

    def _events(self, payload: str, silence_s: float) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=silence_s)
        try:
            connection.request("POST", "/v1/completions", payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise CompletionError(
                    f"status {response.status}: {response.read(500).decode(errors='replace')}"
                )
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if data and data != b"[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise CompletionError(str(event["error"]))
                    yield event
        except TimeoutError as error:
            raise CompletionError(f"nothing arrived for {silence_s:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise CompletionError(f"the connection failed: {error!r}") from error
        finally:
            connection.close()

    def _call(self, method: str, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise CompletionError(f"{path}: {error!r}") from error
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise CompletionError(f"{path}: status {response.status}")
        return data
