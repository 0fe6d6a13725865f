"""Lossless HEVC, in software and on NVIDIA's engines. A stream does not tell who made it."""
