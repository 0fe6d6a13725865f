"""Limits of the calibration registry, for clients and the coordinator."""

MAX_CALIBRATION_BYTES = 1 << 30
MAX_PIECE_BYTES = 1 << 20
DIGEST_BYTES = 32
