"""A slow link without root: a TCP forwarder in user space that lets bytes through at a chosen rate.

Used by the demo, the benchmarks and the fault tests. Connect to `ShapedLink.address` instead of the target;
everything else stays real: sockets, back-pressure, half-close, resets.
"""

from kvstore_bench.shaping.shaped_link import ShapedLink

__all__ = ["ShapedLink"]
