"""Metrics of clients in the process-wide Prometheus registry."""

import subprocess
import sys

SCRIPT = """
from prometheus_client import generate_latest
from kvstore_client.metrics import ClientMetrics
assert b"kvstore_" not in generate_latest()
for _ in range(2):
    ClientMetrics().replanned()
assert b"kvstore_client_replans_total 2.0" in generate_latest()
"""


def test_a_process_shows_client_metrics_when_it_has_a_client() -> None:
    """An engine's API server imports this package, but another process counts."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
