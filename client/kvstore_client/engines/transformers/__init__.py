"""Hugging Face transformers: `CachedModel` wraps a causal language model."""

from kvstore_client.engines.transformers.model import CachedModel, GenerationReport
from kvstore_client.engines.transformers.requests import RequestQueue

__all__ = ["CachedModel", "GenerationReport", "RequestQueue"]
