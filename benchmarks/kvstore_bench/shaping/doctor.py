"""Checks of `kvstore doctor`: ways to slow a link down for the demo, tests and benchmarks."""

import os
import shutil
import subprocess

from kvstore_bench.shaping.shaped_link import ShapedLink
from kvstore_service.doctor.finding import Finding, missing, present

NAMESPACE_TIMEOUT_S = 3.0

_USER_SPACE_INSTEAD = "User-space shaping works without it."
# Runs in a temporary network namespace, which ends with the command.
_SHAPE_A_VETH_PAIR = (
    "ip link add near type veth peer name far && "
    "tc qdisc add dev near root tbf rate 1gbit burst 256kb latency 20ms"
)


def user_space_shaping() -> Finding:
    with ShapedLink("127.0.0.1:1", bandwidth_bps=1e9) as link:
        return present(f"10 Mbit/s to 5 Gbit/s without root; tried on {link.address}")


def namespace_shaping() -> Finding:
    absent = [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]
    if absent:
        return missing(f"not found: {', '.join(absent)}", f"apt install iproute2. {_USER_SPACE_INSTEAD}")
    if os.geteuid() != 0:
        return missing("needs root", _USER_SPACE_INSTEAD)
    try:
        tried = subprocess.run(
            ["unshare", "--net", "sh", "-c", _SHAPE_A_VETH_PAIR],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=NAMESPACE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return missing(f"no answer within {NAMESPACE_TIMEOUT_S:.0f} s", _USER_SPACE_INSTEAD)
    if tried.returncode != 0:
        reason = tried.stderr.strip() or f"exit status {tried.returncode}"
        return missing(
            f"refused: {reason}",
            f"In a container: grant CAP_NET_ADMIN and CAP_SYS_ADMIN. {_USER_SPACE_INSTEAD}",
        )
    return present("a shaped veth pair in a namespace works")


# Name, whether the service needs it, and the check itself.
CHECKS = (
    ("slow link in user space", False, user_space_shaping),
    ("slow link in namespaces", False, namespace_shaping),
)
