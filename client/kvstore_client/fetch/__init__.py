"""The fetch pipeline: plan -> receive -> decode -> restore -> deliver, one module per stage."""

from kvstore_client.fetch.decode import ChunkFeatures
from kvstore_client.fetch.deliver import FetchReport
from kvstore_client.fetch.pipeline import Fetch

__all__ = ["ChunkFeatures", "Fetch", "FetchReport"]
