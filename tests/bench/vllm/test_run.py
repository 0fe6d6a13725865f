"""Rounds over policies and links, with servers that answer as vLLM does, at once."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvstore_bench.shaping import netns
from kvstore_bench.shaping.netns import NetworkNamespace
from kvstore_bench.vllm import run, stores
from kvstore_bench.vllm.completions import Completions
from kvstore_bench.vllm.engine import Engine
from kvstore_bench.vllm.options import Options
from kvstore_bench.vllm.policies import Deployment
from kvstore_bench.vllm.prompts import windows
from kvstore_bench.vllm.run import Bench, Measured

REASON = netns.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
BLOCK = 128


class Server:
    """Answers with the prompt's first token. Has what it was asked before, until it is told to forget."""

    def __init__(self, *, reuses: bool, fails_from: float = float("inf")) -> None:
        self.reuses, self.fails_from = reuses, fails_from
        self.requests = 0
        self.cached = 0
        self.stored: set[tuple[int, ...]] = set()

    def reused(self, prompt: list[int]) -> int:
        usable = (len(prompt) - 1) // BLOCK * BLOCK
        found = usable if self.reuses and tuple(prompt) in self.stored else min(usable, self.cached)
        self.stored.add(tuple(prompt))
        self.cached = len(prompt) // BLOCK * BLOCK
        return found


@contextmanager
def listening(server: Server) -> Iterator[Completions]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/reset_prefix_cache":
                server.cached = 0
                self.answer(200, b'{"success": true}')
                return
            server.requests += 1
            if server.requests >= server.fails_from:
                self.answer(500, b"no memory")
                return
            prompt = json.loads(data)["prompt"]
            usage = {"prompt_tokens_details": {"cached_tokens": server.reused(prompt)}}
            events: list[dict[str, Any]] = [
                {"choices": [{"token_ids": [prompt[0]]}]},
                {"choices": [], "usage": usage},
            ]
            self.answer(200, b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))

        def answer(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        try:
            yield Completions(served.server_address[1], "model")
        finally:
            served.shutdown()
            thread.join()


class Told:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def advance(self, stage: str, done: int, total: int) -> None:
        """Progress is not looked at."""

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a benchmark of these servers."""
    monkeypatch.setattr(stores, "_SETTLED_S", 0.05)
    monkeypatch.setattr(run, "_QUIET_S", 0.01)
    with ExitStack() as stack:
        link = stack.enter_context(NetworkNamespace(None))

        def make(servers: dict[str, Server], **more: Any) -> Bench:
            deployments = {}
            for name, server in servers.items():
                engine = SimpleNamespace(
                    completions=stack.enter_context(listening(server)), has_ended=lambda: False
                )
                store = (
                    SimpleNamespace(stored=lambda server=server: len(server.stored))
                    if server.reuses
                    else None
                )
                deployments[name] = Deployment(name, cast("Engine", engine), store, lambda: None)
            options = Options(Path("model"), "model", [None, 1e8], [600], **{"rounds": 3, "texts": 2} | more)
            prompts = windows(range(2000), options.tokens, options.texts)
            return Bench(options, link, deployments, prompts, Told(), lambda _: None, Measured())

        yield make


def test_every_round_asks_every_policy_behind_every_link(bench: Any) -> None:
    made = bench({"cold": Server(reuses=False), "exact": Server(reuses=True)}, answer_tokens=1)
    made.prepare()
    made.measure()
    counted = [sample for sample in made.measured.samples if sample.counted]
    assert made.measured.complete_rounds == 3
    assert len(counted) == 3 * 2 * 2
    assert {(s.policy, s.reused_tokens) for s in counted} == {("cold", 0), ("exact", 512)}
    assert all(sample.same_as_cold and sample.same_as_memory_hit for sample in counted)
    assert {sample.text for sample in counted} == {0, 1}


def test_a_policy_that_fails_is_left_out_and_the_others_go_on(bench: Any) -> None:
    broken = Server(reuses=True, fails_from=8)
    made = bench({"cold": Server(reuses=False), "lmcache-raw": broken}, answer_tokens=1)
    made.prepare()
    made.measure()
    assert "failed 3 times in a row: /v1/completions: status 500" in made.measured.left_out["lmcache-raw"]
    assert len([s for s in made.measured.samples if s.policy == "cold"]) == 6


def test_a_policy_that_stores_nothing_is_left_out(bench: Any) -> None:
    forgetful = Server(reuses=True)
    forgetful.reused = lambda _: 0  # type: ignore[method-assign]
    made = bench({"cold": Server(reuses=False), "exact": forgetful}, answer_tokens=1)
    made.prepare()
    assert "nothing could be stored" in made.measured.left_out["exact"]


def test_nothing_begins_when_the_time_is_over(bench: Any) -> None:
    made = bench({"cold": Server(reuses=False)}, answer_tokens=1, budget_s=0.0)
    made.prepare()
    made.measure()
    assert not made.measured.samples
    assert made.measured.notes == ["the time was over in round 1 of 3"]
