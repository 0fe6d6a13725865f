"""What the cluster keeps while its processes are killed: three Ray nodes, a steady load, and an audit at the end."""

from kvstore_bench.faults.plot import plot_faults
from kvstore_bench.faults.rows import failures
from kvstore_bench.faults.run import Options, Outcome, run

__all__ = ["Options", "Outcome", "failures", "plot_faults", "run"]
