"""A slow link without root: a TCP forwarder in user space that forwards bytes at a chosen rate.

The demo, the benchmarks and the fault tests use it. Clients connect to `ShapedLink.address` instead of the target.
Sockets, back-pressure, half-close and resets behave as on a real connection.
"""

from kvstore_bench.shaping.shaped_link import ShapedLink

__all__ = ["ShapedLink"]
