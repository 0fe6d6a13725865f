"""The command that sends the probe says what is wrong with the URL it was given."""

import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import StreamRequestHandler, TCPServer

import pytest

from kvstore_client.engines.vllm.probe import main


class Web(BaseHTTPRequestHandler):
    """A server of something else."""

    def do_GET(self) -> None:
        body = b"{}" if "json" in self.path else b"<html>"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Binary(StreamRequestHandler):
    """A server of another protocol, such as a coordinator's."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(b"\x00\x00\x18\x04")


Serve = Callable[[TCPServer], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[TCPServer] = []

    def start(server: TCPServer) -> str:
        started.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("what", ["", "html", "json", "binary"])
def test_a_url_of_something_else_is_named(what: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    url = what
    if what == "binary":
        url = serve(TCPServer(("127.0.0.1", 0), Binary))
    elif what:
        url = f"{serve(HTTPServer(('127.0.0.1', 0), Web))}/{what}"
    monkeypatch.setattr(sys, "argv", ["probe", url])
    with pytest.raises(SystemExit, match=f"{url} is not the URL of a vLLM server"):
        main()
