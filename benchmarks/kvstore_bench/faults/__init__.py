"""`kvstore bench faults`: kills processes of a cluster on three Ray nodes under load, and audits its chunks."""

from kvstore_bench.faults.plot import plot_faults
from kvstore_bench.faults.rows import failures
from kvstore_bench.faults.run import Options, Outcome, run

__all__ = ["Options", "Outcome", "failures", "plot_faults", "run"]
