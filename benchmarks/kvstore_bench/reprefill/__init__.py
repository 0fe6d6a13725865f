"""`kvstore bench reprefill`: questions over a part of a long stored prefix, against systems that read it otherwise."""

from kvstore_bench.reprefill.run import Options, Result, run

__all__ = ["Options", "Result", "run"]
