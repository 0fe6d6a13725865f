"""Adapters of inference engines: thin shells over the client."""
