"""How long at least one of several overlapping things went on."""

import time


class BusyClock:
    """Adds up the time during which anything is under way. Not thread-safe."""

    def __init__(self) -> None:
        self._under_way = 0
        self._since_s = 0.0
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        return self._seconds + (time.monotonic() - self._since_s if self._under_way else 0.0)

    def begin(self, count: int) -> None:
        """So many more things are under way."""
        if not self._under_way:
            self._since_s = time.monotonic()
        self._under_way += count

    def end(self, count: int) -> None:
        """So many things have ended."""
        self._under_way -= count
        if count and not self._under_way:
            self._seconds += time.monotonic() - self._since_s
