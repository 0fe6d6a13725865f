"""Ports of the servers that peers' scripts start. Standard library only, like `loop`: for the peers' own Python."""

import socket
import sys
import time


def free_port() -> int:
    """Of this machine's loopback, as of now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int, server: str, timeout_s: float) -> None:
    """Returns once somebody listens there; ends the process when nobody does in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    sys.exit(f"{server} does not answer")
