"""Processes that a test has started, and those that these have started."""

from contextlib import suppress

import psutil


def descendants(name: str, pid: int | None = None) -> list[psutil.Process]:
    """The living descendants of a process (by default this one) whose names begin like this. Helpers of Ray come and
    go, so some of those that are listed may have ended before they can be asked for their name."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith(name):
                found.append(process)
    return found
