"""Limits of the calibration registry that both ends keep to."""

MAX_CALIBRATION_BYTES = 1 << 30
MAX_PIECE_BYTES = 1 << 20
DIGEST_BYTES = 32
