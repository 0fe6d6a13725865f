"""Hostile chunks: mutants that know the format and repair every checksum, and what decoding them twice shows."""
