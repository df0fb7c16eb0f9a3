"""Copies that take the place of memory that is mapped from a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial

from ..binding import libc
from ..binding.descriptor import own
from ..errors import XenCallError

_CHUNK_BYTES = 1 << 24


def put_copy_over(
    address: int,
    length: int,
    fd: int,
    offset: int,
    size: int,
    change: Callable[[], Exception | None],
) -> str:
    """Put a copy where a range of a file is mapped, in one step; zeros if that is impossible.

    Args:
        address: host address of the memory, which the caller keeps mapped.
        length: of the range, in bytes.
        fd: descriptor of the file.
        offset: where the range begins in the file, in bytes.
        size: of the file, in bytes, when it was opened.
        change: returns an error if the file has changed since it was opened.

    Returns:
        Why the memory shows zeros; empty if it shows what the file had.

    Raises:
        XenCallError: the memory is still mapped from the file.
    """
    try:
        # A file for each range: its memory is freed when the range is unmapped.
        copy = own(partial(os.memfd_create, "xenmapcache-image", os.MFD_CLOEXEC))
        os.ftruncate(copy.fileno(), length)  # the file may end inside its last page
        end = min(offset + length, size)
        while offset < end:
            sent = os.sendfile(copy.fileno(), fd, offset, min(end - offset, _CHUNK_BYTES))
            if not sent:
                return _show_zeros(address, length, f"the file ends at {offset:#x} now")
            offset += sent
        changed = change()  # the kernel's patience may have ended
        if changed:
            return _show_zeros(address, length, str(changed))
        libc.map_file(copy.fileno(), 0, length, writable=False, address=address)
    except Exception as error:  # the memory must not stay mapped from the file
        return _show_zeros(address, length, str(error))
    with contextlib.suppress(XenCallError):
        libc.dont_fork(address, length)
    return ""


def _show_zeros(address: int, length: int, reason: str) -> str:
    if not libc.map_zeros_over(address, length, replace=True):
        raise XenCallError("mmap", None, 0, f"no zeros for {length:#x} bytes, and {reason}")
    return reason or "unknown error"
