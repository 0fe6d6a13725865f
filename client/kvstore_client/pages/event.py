"""An event with a file descriptor that is readable while the event is set."""

from __future__ import annotations

import os


class Event:
    """For select, poll or an event loop. Not thread-safe: the owner calls `set`, `clear` and `close` under its lock."""

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        if hasattr(os, "eventfd"):
            self._read = self._write = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self._read, self._write = os.pipe()
            os.set_blocking(self._read, False)
            os.set_blocking(self._write, False)
        self._is_set = False
        self._closed = False

    def fileno(self) -> int:
        """File descriptor. It is the same as long as the event lives, also in forked children."""
        return self._read

    def set(self) -> None:
        if not self._is_set and not self._closed:
            self._is_set = True
            os.write(self._write, (1).to_bytes(8, "little"))

    def clear(self) -> None:
        if self._is_set and not self._closed:
            self._is_set = False
            os.read(self._read, 8)

    def renew(self) -> None:
        """In a forked child: stop sharing the event with the parent, but keep the number of its descriptor."""
        if self._closed:
            return
        kept = self._read, self._write
        self._open()
        opened = self._read, self._write
        for new, old in zip(opened, kept, strict=True):
            os.dup2(new, old, inheritable=False)
        for new in set(opened):
            os.close(new)
        self._read, self._write = kept

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for descriptor in {self._read, self._write}:
            os.close(descriptor)
