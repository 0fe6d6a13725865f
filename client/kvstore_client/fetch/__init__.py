"""The fetch pipeline: plan -> receive -> decode -> restore -> deliver, one module per stage."""

from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.decode import ChunkFeatures
from kvstore_client.fetch.destination import Destination
from kvstore_client.fetch.pipeline import Fetch
from kvstore_client.fetch.replanner import Computing
from kvstore_client.fetch.report import FetchReport
from kvstore_client.fetch.summaries import FetchReports

__all__ = ["ChunkFeatures", "Computing", "Destination", "Fetch", "FetchReport", "FetchReports", "ReadTask"]
