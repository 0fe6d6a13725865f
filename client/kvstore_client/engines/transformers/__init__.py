"""Hugging Face transformers: `CachedModel` wraps a causal language model."""

from kvstore_client.engines.transformers.model import CachedModel, GenerationReport

__all__ = ["CachedModel", "GenerationReport"]
