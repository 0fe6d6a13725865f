"""What an operator sees of a cluster: metrics, a dashboard and alerts, logs, a status page and reports."""

from pathlib import Path

FILES = Path(__file__).parent / "files"
"""The Grafana dashboard and Prometheus' alert rules."""
