"""Which version of a file lies at a path, without reading it."""

import os

FileVersion = tuple[int, int, int, int]
"""Inode, size in bytes, and the times of modification and change in nanoseconds."""


def file_version(stat: os.stat_result) -> FileVersion:
    """The version of the file that was looked at. Where two are equal, so is what is in the file.

    Tools that unpack files may set the time of modification, so that other weights of the same shapes have it, too.
    They cannot set the time of change.
    """
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
