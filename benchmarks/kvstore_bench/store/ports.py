"""Ports for the servers that peers' scripts start. Uses only the standard library, like `loop`."""

import socket
import sys
import time


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int, server: str, timeout_s: float) -> None:
    """Waits until a server listens on the port. Exits the process after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    sys.exit(f"{server} did not listen on port {port} within {timeout_s:g} s")
