"""Default address of the coordinator."""

DEFAULT_ADDRESS = "127.0.0.1:7420"
