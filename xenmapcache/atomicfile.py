"""A file that is there when it is complete, and not before: nothing is left of one that failed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator

from .errors import XenMapCacheError

_OF_WRITING = frozenset({errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC})


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[int]:
    """Give a descriptor to write to; the file takes its place when the block ends well.

    A file that is there is replaced. The new one is its owner's alone (mode 0600): it
    holds a guest's memory. Where the file system can, it has no name until it is
    complete, so that not even a killed process leaves anything behind.

    Raises:
        OSError: it cannot be made or written, or what is there is no regular file.
    """
    target = os.path.realpath(path)
    _refuse_irregular(target)
    folder, name = os.path.split(target)
    start = os.fsdecode(os.fsencode(name)[:200])  # names are limited in bytes
    draft = os.path.join(folder, f".{start}.{secrets.token_hex(4)}.part")  # noqa: PTH118 - all in str
    fd, named = _open(folder, draft)
    try:
        yield fd
        if not named:
            # Before there is one: an interrupt may come between the call and the next line.
            named = True
            # The descriptor's own folder entry is followed only by linkat, hence src_dir_fd.
            os.link(f"/proc/self/fd/{fd}", draft, src_dir_fd=fd, follow_symlinks=True)
        os.replace(draft, target)  # noqa: PTH105 - all in str
    except OSError as error:
        if (
            error.filename is None
            and error.errno in _OF_WRITING
            and not isinstance(error, XenMapCacheError)
        ):
            error.filename = target  # os.pwrite knows none
        raise
    finally:
        os.close(fd)
        if named:
            with contextlib.suppress(FileNotFoundError):  # it has taken its place
                os.unlink(draft)  # noqa: PTH108 - all in str


def _refuse_irregular(target: str) -> None:
    """Find out before all the work what cannot be replaced, and what had better not: /dev/null."""
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, "That is no regular file, and is left alone", target)


def _open(folder: str, draft: str) -> tuple[int, bool]:
    """Return a descriptor, and whether the file has a name."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(folder, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        # EISDIR: a kernel that does not know the flag.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    else:
        if os.path.exists(f"/proc/self/fd/{fd}"):  # noqa: PTH110 - all in str
            return fd, False
        os.close(fd)
    return os.open(draft, flags | os.O_CREAT | os.O_EXCL, 0o600), True
