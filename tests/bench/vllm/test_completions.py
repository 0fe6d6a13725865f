"""The HTTP client against a server that streams as vLLM does."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kvstore_bench.vllm.completions import Answer, Completions
from kvstore_bench.vllm.http_call import RequestError

USAGE = {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 1792}}}


def chunk(*token_ids: int) -> dict[str, Any]:
    return {"choices": [{"text": "", "token_ids": list(token_ids)}]}


@contextmanager
def answering(
    parts: Sequence[bytes], status: int = 200, hang: threading.Event | None = None, end: bytes = b""
) -> Iterator[tuple[Completions, list[dict[str, Any]]]]:
    """A client of a server that sends these parts, waits for `hang`, and sends the end. Also the bodies that it
    received."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            for part in parts:
                self.wfile.write(part)
                self.wfile.flush()
            if hang is not None:
                hang.wait(30)
            self.wfile.write(end)

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Completions(server.server_address[1], "model"), received
        finally:
            server.shutdown()
            thread.join()


def streaming(
    events: Sequence[dict[str, Any]], status: int = 200, hang: threading.Event | None = None
) -> AbstractContextManager[tuple[Completions, list[dict[str, Any]]]]:
    """As `answering`, with a stream of events."""
    parts = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return answering(parts, status, hang, end=b"data: [DONE]\n\n")


def test_tokens_and_reuse_are_read_from_the_stream() -> None:
    with streaming([chunk(), chunk(5), chunk(6, 7), USAGE]) as (client, received):
        answer = client.complete([1, 2, 3], 3, 10)
    assert answer.tokens == (5, 6, 7)
    assert answer.reused_tokens == 1792
    assert 0 < answer.ttft_s <= answer.total_s
    (body,) = received
    assert (body["prompt"], body["max_tokens"], body["temperature"]) == ([1, 2, 3], 3, 0)


@pytest.mark.parametrize(
    ("events", "status", "why"),
    [
        ([], 500, "status 500"),
        ([{"error": {"message": "KV load failed"}}], 200, "KV load failed"),
        ([USAGE], 200, "no tokens"),
    ],
)
def test_a_failed_request_says_why(events: list[dict[str, Any]], status: int, why: str) -> None:
    with streaming(events, status) as (client, _), pytest.raises(RequestError, match=why):
        client.complete([1], 1, 10)


def test_a_silent_server_is_waited_for_with_a_bound() -> None:
    hang = threading.Event()
    with streaming([chunk(5)], hang=hang) as (client, _):
        with pytest.raises(RequestError, match="nothing arrived"):
            client.complete([1], 2, 0.2)
        hang.set()


def test_the_distribution_of_the_next_token_is_read_by_token() -> None:
    found = {"token_id:2": -3.0, "token_id:0": -1.0, "token_id:1": -2.0}
    told = USAGE | {"choices": [{"logprobs": {"top_logprobs": [found]}}]}
    with answering([json.dumps(told).encode()]) as (client, received):
        expected = client.next_token([1, 2, 3], 10)
    assert expected.log_probabilities.tolist() == [-1.0, -2.0, -3.0]
    assert expected.reused_tokens == 1792
    (body,) = received
    assert (body["prompt"], body["max_tokens"], body["logprobs"]) == ([1, 2, 3], 1, -1)


def test_nobody_listening_is_a_failure() -> None:
    with streaming([]) as (client, _):
        pass
    with pytest.raises(RequestError, match="connection failed"):
        client.complete([1], 1, 10)
    assert not client.is_healthy()


def test_decoding_speed_does_not_count_the_first_token() -> None:
    assert Answer(1.0, 3.0, (1, 2, 3), 0).decode_tokens_per_s == 1.0
    assert Answer(1.0, 1.0, (1,), 0).decode_tokens_per_s is None
