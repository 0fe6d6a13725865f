"""Adapter for Hugging Face transformers: `CachedModel` wraps a causal language model."""

from kvstore_client.engines.transformers.model import CachedModel
from kvstore_client.engines.transformers.requests import RequestQueue
from kvstore_client.reuse.report import GenerationReport

__all__ = ["CachedModel", "GenerationReport", "RequestQueue"]
