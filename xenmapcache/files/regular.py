"""Regular files, opened without waiting for another program."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from functools import partial

from ..binding.descriptor import Descriptor, own

_BREAK_TIME_S = 60
"""Longer than the kernel makes a reader wait for another program's write lease, by default."""


class IrregularFileError(ValueError):
    """A name belongs to a folder, a device, a FIFO or a socket, or to a link that is excluded."""


def is_foreign(error: OSError) -> bool:
    """Return whether an error that was caught around calls of ours is a signal handler's.

    Handlers raise exceptions like TimeoutError, which have no errno, and errors of opening a file,
    which name the file. Calls that use a descriptor raise errors with an errno and without a name.
    """
    return error.errno is None or error.filename is not None


def open_regular(path: str | os.PathLike[str], *, follow_links: bool = True) -> Descriptor:
    """Open a regular file for reading; never wait for a FIFO's other end.

    Args:
        path: of the file.
        follow_links: whether the name may be a symbolic link.

    Raises:
        OSError: the file cannot be opened.
        IrregularFileError: the file is not a regular file.
    """
    # Opening some devices has an effect, so the name is looked at first. Another program may
    # then replace what it names, so the descriptor is looked at, too.
    _check_regular(path, os.stat(path, follow_symlinks=follow_links))  # noqa: PTH116 - bytes, too
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    file = _open_patiently(partial(os.open, path, flags if follow_links else flags | os.O_NOFOLLOW))
    try:
        _check_regular(path, os.fstat(file.fileno()))
        return file
    finally:
        del file  # or the traceback of an error would keep it


def _open_patiently(make: Callable[[], int]) -> Descriptor:
    """Open without O_NONBLOCK's refusal of a file on which another program has a write lease."""
    deadline = time.monotonic() + _BREAK_TIME_S
    while True:
        try:
            return own(make)
        except BlockingIOError:  # the kernel has signalled that program
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _check_regular(path: str | os.PathLike[str], state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise IrregularFileError(
            f"{os.fsdecode(path)} is not a regular file; copy its content to a regular file first"
        )
