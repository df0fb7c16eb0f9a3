"""Writing pages to a file in which zeros take no room on the disk."""

from __future__ import annotations

import os

from ..address import PAGE_SIZE

_ZEROS = bytes(PAGE_SIZE)


def write_but_zeros(fd: int, data: bytes | bytearray, offset: int) -> None:
    """Write pages, and leave a gap in the file where they are zeros."""
    view = memoryview(data)
    start: int | None = None
    for position in range(0, len(data), PAGE_SIZE):
        if data.startswith(_ZEROS, position):
            if start is not None:
                write_all(fd, view[start:position], offset + start)
                start = None
        elif start is None:
            start = position
    if start is not None:
        write_all(fd, view[start:], offset + start)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write bytes at an offset, however many calls that takes."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
