"""Lossless HEVC, in software and on NVIDIA's engines. A stream does not record its encoder."""
