"""A slow link with root: a network namespace behind a pair of virtual interfaces that the kernel shapes.

`tc tbf` shapes both ends in the kernel, instead of `ShapedLink` in user space. No process of the benchmark forwards
bytes, and processes in the namespace have no other route out.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstore_codec.errors import ConfigurationError, StartupError

_PREFIX = "kvlink"
_LATENCY = "20ms"
# The bucket holds the tokens that accrue while the kernel is busy. A bucket smaller than a packet would pass nothing.
_BURST_S, _LEAST_BURST_BYTES = 0.002, 16 << 10
_TIMEOUT_S = 10.0
_numbers = itertools.count()


class NetworkNamespace:
    """A network namespace with a shaped link to the host. A context manager. Processes inside reach servers that listen
    on `host_address`, and servers inside that listen on `inside_address` can be reached from the host; a command with
    the prefix `command` runs inside.

    Each direction has `bandwidth_bps`; None leaves the link unshaped. The next run removes leftovers of killed runs.
    Entering raises StartupError, with the reason, if a namespace cannot be made.
    """

    def __init__(self, bandwidth_bps: float | None, burst_s: float = _BURST_S) -> None:
        """`burst_s` is how much may pass at once, as time on the link. With 20 ms, eight connections at a time lose no
        packet at 100 Mbit/s; with 2 ms, 3 % of the bytes are sent twice."""
        self._bandwidth_bps, self._burst_s = bandwidth_bps, burst_s
        number = next(_numbers)
        self.name = f"{_PREFIX}-{os.getpid()}-{number}"
        # The name of an interface has at most 15 bytes.
        self._outer = f"kv{os.getpid():x}o{number:x}"
        self._inner = f"kv{os.getpid():x}i{number:x}"
        self.host_address = self.inside_address = ""
        self.command = ("ip", "netns", "exec", self.name)

    def set_bandwidth(self, bandwidth_bps: float | None) -> None:
        """Changes the bandwidth of both directions, which may carry bytes. Takes about 10 ms. Raises ConfigurationError
        and StartupError."""
        self._shape(bandwidth_bps)

    def cut(self) -> None:
        """Loses all bytes in both directions, and tells neither end, like a cable that is pulled out between two
        switches. Raises StartupError."""
        _run("ip", "-n", self.name, "link", "set", self._inner, "down")

    def mend(self) -> None:
        """Ends a `cut`. Raises StartupError."""
        _run("ip", "-n", self.name, "link", "set", self._inner, "up")

    @property
    def bytes_from_inside(self) -> int:
        """Bytes that the host has received from inside, packet headers included."""
        return int(Path("/sys/class/net", self._outer, "statistics", "rx_bytes").read_text())

    def __enter__(self) -> Self:
        _require_permission()
        remove_leftovers()
        network = _free_network()
        self.host_address, self.inside_address = f"{network}.1", f"{network}.2"
        try:
            _run("ip", "netns", "add", self.name)
            _run("ip", "link", "add", self._outer, "type", "veth", "peer", "name", self._inner)
            _run("ip", "link", "set", self._inner, "netns", self.name)
            _run("ip", "address", "add", f"{self.host_address}/24", "dev", self._outer)
            _run("ip", "link", "set", self._outer, "up")
            _run("ip", "-n", self.name, "address", "add", f"{self.inside_address}/24", "dev", self._inner)
            _run("ip", "-n", self.name, "link", "set", self._inner, "up")
            _run("ip", "-n", self.name, "link", "set", "lo", "up")
            self._shape(self._bandwidth_bps)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _shape(self, bandwidth_bps: float | None) -> None:
        if bandwidth_bps is not None and not 0 < bandwidth_bps < float("inf"):
            raise ConfigurationError(f"a link needs a bandwidth above 0 bit/s, not {bandwidth_bps}")
        for command, interface in ((("tc",), self._outer), (("tc", "-n", self.name), self._inner)):
            if bandwidth_bps is None:
                _try(*command, "qdisc", "delete", "dev", interface, "root")
                continue
            burst_bytes = max(_LEAST_BURST_BYTES, int(bandwidth_bps * self._burst_s / 8))
            bucket = ("rate", f"{bandwidth_bps:.0f}bit", "burst", str(burst_bytes), "latency", _LATENCY)
            _run(*command, "qdisc", "replace", "dev", interface, "root", "tbf", *bucket)

    def _remove(self) -> None:
        # The kernel deletes an interface with its other end, but only after the namespace's last process has ended.
        _try("ip", "link", "delete", self._outer)
        _try("ip", "netns", "delete", self.name)


def unavailable() -> str | None:
    """The reason why this process cannot make network namespaces, or None if it can."""
    try:
        _require_permission()
    except StartupError as error:
        return str(error)
    return None


def remove_leftovers() -> list[str]:
    """Removes the namespaces of runs whose process has ended, and returns their names."""
    removed = []
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0] if line.strip() else ""
        prefix, _, rest = name.partition("-")
        pid, _, number = rest.partition("-")
        if prefix == _PREFIX and pid.isdigit() and number.isdigit() and not _is_alive(int(pid)):
            _try("ip", "link", "delete", f"kv{int(pid):x}o{int(number):x}")
            _try("ip", "netns", "delete", name)
            removed.append(name)
    return removed


def _require_permission() -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise StartupError(
            f"network namespaces need {' and '.join(missing)}: install iproute2, or shape in user space"
        )
    if os.geteuid() != 0:
        raise StartupError(
            "network namespaces need root, and this process is not root: use sudo, or shape in user space"
        )
    probe = f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"
    try:
        _run("ip", "netns", "add", probe)
    except StartupError as error:
        raise StartupError(
            f"root cannot make network namespaces here (a container without CAP_SYS_ADMIN?): {error}; "
            "shape in user space instead"
        ) from error
    finally:
        _try("ip", "netns", "delete", probe)


def _free_network() -> str:
    """The first three numbers of an unused /24 network. Raises StartupError."""
    taken = _run("ip", "-4", "route", "show", "table", "all") + _run("ip", "-4", "-o", "address", "show")
    for second, third in itertools.product(range(213, 223), range(256)):
        network = f"10.{second}.{third}"
        if f"{network}." not in taken:
            return network
    raise StartupError("every network from 10.213.0.0 to 10.222.255.0 is in use")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise StartupError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartupError(f"`{' '.join(command)}` failed: {error}") from error
    return done.stdout


def _try(*command: str) -> None:
    """Runs a command that removes something. Ignores failures, because it may not exist."""
    with contextlib.suppress(StartupError):
        _run(*command)
