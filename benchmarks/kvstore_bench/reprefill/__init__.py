"""`kvstore bench reprefill`: questions over a part of a long stored prefix, against systems that read it otherwise."""

from kvstore_bench.reprefill.run import Options, Result, run
from kvstore_bench.reprefill.targets import gain, speedups, targets

__all__ = ["Options", "Result", "gain", "run", "speedups", "targets"]
