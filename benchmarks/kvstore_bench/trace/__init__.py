"""`kvstore bench trace`: the hit rates of a recorded workload, replayed in virtual time through the real eviction and
placement code.

trace | workloads -> replay (policies) and optimum (Belady) -> placement (balance, movement) -> rows -> plot
                  -> nodes (real storage nodes, put and looked up as clients do) and oracle (keeps beginnings)
"""

from kvstore_bench.trace.plot import plot_hit_rates, plot_through_nodes
from kvstore_bench.trace.run import Options, Result, run

__all__ = ["Options", "Result", "plot_hit_rates", "plot_through_nodes", "run"]
