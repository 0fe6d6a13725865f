"""How much memory a process takes for a moment, from the kernel's record of its peak (Linux)."""

from pathlib import Path
from typing import Self

_RESET_PEAK = "5\n"


class PeakMemory:
    """Measures the rise of this process's resident memory above what it was. Memory that is free within the process
    does not count when it is used again. A context manager."""

    def __init__(self) -> None:
        self._reset = Path("/proc/self/clear_refs").open("w")  # noqa: SIM115 (closed by `__exit__`)
        self._status = Path("/proc/self/status").open("rb", buffering=0)  # noqa: SIM115
        self._before_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reset.close()
        self._status.close()

    def begin(self) -> None:
        """Measure from now on."""
        self._reset.write(_RESET_PEAK)
        self._reset.flush()
        self._before_bytes = self.peak_bytes()

    def taken_bytes(self) -> int:
        """The highest rise since `begin`."""
        return self.peak_bytes() - self._before_bytes

    def peak_bytes(self) -> int:
        """The highest resident memory since `begin`."""
        self._status.seek(0)
        status = self._status.read(4096)
        start = status.index(b"VmHWM:") + len(b"VmHWM:")
        return int(status[start : status.index(b"kB", start)]) << 10
